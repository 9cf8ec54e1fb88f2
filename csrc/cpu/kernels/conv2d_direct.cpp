#include "cpu/kernels/conv2d_direct.h"

namespace fastdiff::CPU_CAPABILITY {

void conv2d_direct(const Conv2d& p) { direct<Windows>(p); }

// Panels of [R, S, C, filters].
void conv2d_direct_pack(const float* weight, const int64_t* sizes, float* out, int64_t* size,
                        const Threads& threads) {
  const int64_t filters = sizes[0], channels = sizes[1], window = sizes[2] * sizes[3];
  const int64_t depth = window * channels;
  *size = depth * packed_columns(filters);
  if (!out) return;
  share(threads, (filters + kPanel - 1) / kPanel, [&](int64_t begin, int64_t end) {
    for (int64_t first = begin * kPanel; first < std::min(filters, end * kPanel); first += kPanel) {
      const int64_t columns = std::min(kPanel, filters - first), packed = packed_columns(columns);
      float* panel = out + first * depth;
      for (int64_t rs = 0; rs < window; ++rs)
        for (int64_t c = 0; c < channels; ++c)
          for (int64_t k = 0; k < packed; ++k)
            *panel++ = k < columns ? weight[((first + k) * channels + c) * window + rs] : 0;
    }
  });
}

}  // namespace fastdiff::CPU_CAPABILITY
