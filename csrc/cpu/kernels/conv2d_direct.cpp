#include "cpu/kernels/conv2d_direct.h"

#include "cpu/kernels/conv2d_pack.h"

namespace fastdiff::CPU_CAPABILITY {

void conv2d_direct(const Conv2d& p) { direct<Windows>(p); }

// Panels of [R, S, C, filters].
void conv2d_direct_pack(const ConvWeight& size, const float* weight, void* packed, int64_t* count,
                        const Threads& threads) {
  const int64_t filters = size.filters, channels = size.channels,
                window = size.kernel_h * size.kernel_w, depth = window * channels;
  auto* out = static_cast<float*>(packed);
  *count = depth * packed_columns(filters);
  if (!out) return;
  pack_parts(threads, filters, kPanel, channels,
             [&](int64_t first, int64_t columns, int64_t begin, int64_t end) {
               const int64_t whole = packed_columns(columns);
               for (int64_t rs = 0; rs < window; ++rs)
                 for (int64_t c = begin; c < end; ++c) {
                   float* row = out + first * depth + (rs * channels + c) * whole;
                   for (int64_t k = 0; k < whole; ++k)
                     row[k] = k < columns ? weight[((first + k) * channels + c) * window + rs] : 0;
                 }
             });
}

}  // namespace fastdiff::CPU_CAPABILITY
