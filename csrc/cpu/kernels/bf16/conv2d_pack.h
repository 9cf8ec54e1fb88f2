// The weight of a convolution with bfloat16 products: panels of 32 filters, and in them planes of
// 32 channels, taps, and parts of values, each of which is a step of products.h. What is missing in
// a last panel and plane is zero.
#pragma once

#include "cpu/kernels/bf16/products.h"
#include "cpu/kernels/conv2d.h"
#include "cpu/kernels/conv2d_pack.h"

namespace fastdiff::CPU_CAPABILITY {

template <int kParts>
int64_t packed_values(const ConvWeight& size) {
  const int64_t planes = (size.channels + kColumns - 1) / kColumns;
  const int64_t panels = (size.filters + kColumns - 1) / kColumns;
  return panels * planes * size.kernel_h * size.kernel_w * kParts * kStepValues;
}

// `taps_of(k, c)[t]` is tap t of filter k and channel c. A value has one part, itself, or two: what
// bfloat16 keeps of it, and what bfloat16 keeps of the rest.
template <int kParts, class TapsOf>
void pack_bf16(const ConvWeight& size, void* packed, const Threads& threads, TapsOf&& taps_of) {
  const int64_t taps = size.kernel_h * size.kernel_w;
  const int64_t padded = rounded_up(size.channels, kColumns);
  const int64_t plane_values = taps * kParts * kStepValues;
  pack_parts(threads, size.filters, kColumns, padded,
             [&](int64_t first, int64_t filters, int64_t begin, int64_t end) {
               bf16* panel = static_cast<bf16*>(packed) +
                             first / kColumns * (padded / kColumns) * plane_values;
               for (int64_t column = 0; column < kColumns; ++column)
                 for (int64_t c = begin; c < end; ++c) {
                   const int64_t deep = c % kColumns;
                   bf16* to = panel + c / kColumns * plane_values + column / 16 * 512 +
                              deep / 2 * 32 + column % 16 * 2 + deep % 2;
                   if (column >= filters || c >= size.channels) {
                     for (int64_t i = 0; i < taps * kParts; ++i) to[i * kStepValues] = bf16{};
                     continue;
                   }
                   const auto from = taps_of(first + column, c);
                   for (int64_t t = 0; t < taps; ++t, to += kParts * kStepValues) {
                     const float value = from[t];
                     to[0] = static_cast<bf16>(value);
                     if constexpr (kParts > 1) {
                       const float rest = value - static_cast<float>(to[0]);
                       to[kStepValues] = static_cast<bf16>(rest == rest ? rest : 0.f);
                     }
                   }
                 }
             });
}

}  // namespace fastdiff::CPU_CAPABILITY
