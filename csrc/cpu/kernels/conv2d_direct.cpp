#include "cpu/kernels/conv2d_direct.h"

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
  share(threads, (filters + kPanel - 1) / kPanel, [&](int64_t begin, int64_t end) {
    for (int64_t first = begin * kPanel; first < std::min(filters, end * kPanel); first += kPanel) {
      const int64_t columns = std::min(kPanel, filters - first), whole = packed_columns(columns);
      float* panel = out + first * depth;
      for (int64_t rs = 0; rs < window; ++rs)
        for (int64_t c = 0; c < channels; ++c)
          for (int64_t k = 0; k < whole; ++k)
            *panel++ = k < columns ? weight[((first + k) * channels + c) * window + rs] : 0;
    }
  });
}

}  // namespace fastdiff::CPU_CAPABILITY
