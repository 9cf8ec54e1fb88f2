// The weight of a convolution with bfloat16 products: panels of 32 filters, and in them planes of
// 32 channels, taps, and parts of values, each of which is a step of products.h. What is missing in
// a last panel and plane is zero.
#pragma once

#include <cstring>

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

// kPackedChannels of a filter, two of which go to each row of a step.
FASTDIFF_INLINE void pack_row(const float* from, bf16* to) {
  bf16 row[kPackedChannels];
  for (int64_t c = 0; c < kPackedChannels; c += kLanes) store_lanes(row + c, load_lanes(from + c));
  for (int64_t c = 0; c < kPackedChannels; c += 2)
    std::memcpy(static_cast<void*>(to + c * 16), row + c, 2 * sizeof(bf16));
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
               // Two channels at a time, which lie side by side.
               for (int64_t column = 0; column < kColumns; ++column) {
                 using Taps = decltype(taps_of(first, begin));
                 if constexpr (std::is_same_v<Taps, const float*> && kParts == 1) {
                   // The channels of a 1x1 kernel are neighbours.
                   if (taps == 1 && column < filters && begin + kPackedChannels <= size.channels) {
                     pack_row(taps_of(first + column, begin),
                              panel + begin / kColumns * plane_values + column / 16 * 512 +
                                  begin % kColumns / 2 * 32 + column % 16 * 2);
                     continue;
                   }
                 }
                 for (int64_t c = begin; c < end; c += 2) {
                   bf16* to = panel + c / kColumns * plane_values + column / 16 * 512 +
                              c % kColumns / 2 * 32 + column % 16 * 2;
                   const bool any = column < filters && c < size.channels;
                   const bool both = any && c + 1 < size.channels;
                   if (!any) {
                     for (int64_t i = 0; i < taps * kParts; ++i)
                       std::memset(static_cast<void*>(to + i * kStepValues), 0, 2 * sizeof(bf16));
                     continue;
                   }
                   const auto even = taps_of(first + column, c);
                   const auto odd = taps_of(first + column, both ? c + 1 : c);
                   for (int64_t t = 0; t < taps; ++t, to += kParts * kStepValues) {
                     const float values[2] = {even[t], both ? odd[t] : 0.f};
                     bf16 parts[kParts][2];
                     for (int i = 0; i < 2; ++i) {
                       parts[0][i] = static_cast<bf16>(values[i]);
                       if constexpr (kParts > 1) {
                         const float rest = values[i] - static_cast<float>(parts[0][i]);
                         parts[1][i] = static_cast<bf16>(rest == rest ? rest : 0.f);
                       }
                     }
                     for (int part = 0; part < kParts; ++part)
                       std::memcpy(to + part * kStepValues, parts[part], sizeof(parts[part]));
                   }
                 }
               }
             });
}

}  // namespace fastdiff::CPU_CAPABILITY
