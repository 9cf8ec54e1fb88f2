#include "cpu/kernels/conv2d_direct.h"

#include "cpu/kernels/conv2d_pack.h"

namespace fastdiff::CPU_CAPABILITY {

void conv2d_direct(const Conv2d& p) { direct<Windows>(p); }

// Panels of [R, S, C, filters].
void conv2d_direct_pack(const ConvWeight& size, const WeightValues& weight, void* packed,
                        int64_t* count, const Threads& threads) {
  const int64_t filters = size.filters, channels = size.channels,
                window = size.kernel_h * size.kernel_w, depth = window * channels;
  auto* out = static_cast<float*>(packed);
  *count = depth * packed_columns(filters);
  if (!out) return;
  pack_parts(threads, filters, kPanel, channels,
             [&](int64_t first, int64_t columns, int64_t begin, int64_t end) {
               const int64_t whole = packed_columns(columns);
               WeightBlock<kPanel> block;
               for (int64_t tap = 0; tap < window; tap += kPackedTaps) {
                 const int64_t taps = std::min(kPackedTaps, window - tap);
                 block.read(weight, first, columns, begin, end, tap, taps);
                 for (int64_t t = 0; t < taps; ++t)
                   for (int64_t c = begin; c < end; ++c)
                     std::memcpy(out + first * depth + ((tap + t) * channels + c) * whole,
                                 block.rows[t][c - begin], whole * sizeof(float));
               }
             });
}

}  // namespace fastdiff::CPU_CAPABILITY
