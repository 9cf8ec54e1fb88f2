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

// A pair of channels of 16 filters at a time, in kParts values each: what bfloat16 keeps of a
// value, and what it keeps of the rest.
template <int kParts>
FASTDIFF_INLINE void pack_pairs(const float* even, const float* odd, bf16* to) {
  const float* channels[2] = {even, odd};
  alignas(64) bf16 values[2][kParts][kGroup];
  for (int i = 0; i < 2; ++i)
    for (int64_t k = 0; k < kGroup; k += kLanes) {
      const F value = load_lanes(channels[i] + k);
      store_lanes(values[i][0] + k, value);
      if constexpr (kParts > 1) {
        // An infinity has no remainder.
        const F rest = value - load_lanes(values[i][0] + k);
        store_lanes(values[i][1] + k, rest == rest ? rest : F{});
      }
    }
  for (int part = 0; part < kParts; ++part)
    interleave(values[0][part], values[1][part], to + part * kStepValues);
}

// `read(block, first, filters, begin, end, tap, taps)` reads a part of the weight:
// WeightBlock::read or what stands for it.
template <int kParts, class Read>
void pack_bf16(const ConvWeight& size, void* packed, const Threads& threads, Read&& read) {
  const int64_t window = size.kernel_h * size.kernel_w;
  const int64_t padded = rounded_up(size.channels, kColumns);
  const int64_t plane_values = window * kParts * kStepValues;
  pack_parts(
      threads, size.filters, kColumns, padded,
      [&](int64_t first, int64_t filters, int64_t begin, int64_t end) {
        bf16* plane = static_cast<bf16*>(packed) +
                      (first / kColumns * (padded / kColumns) + begin / kColumns) * plane_values;
        WeightBlock<kColumns> block;
        for (int64_t tap = 0; tap < window; tap += kPackedTaps) {
          const int64_t taps = std::min(kPackedTaps, window - tap);
          read(block, first, filters, begin, std::min(end, size.channels), tap, taps);
          for (int64_t t = 0; t < taps; ++t)
            for (int64_t c = begin; c < end; c += 2)
              for (int64_t k = 0; k < kColumns; k += kGroup)
                pack_pairs<kParts>(block.rows[t][c - begin] + k, block.rows[t][c - begin + 1] + k,
                                   plane + (tap + t) * kParts * kStepValues + k * kColumns +
                                       c % kColumns / 2 * kColumns);
        }
      });
}

}  // namespace fastdiff::CPU_CAPABILITY
