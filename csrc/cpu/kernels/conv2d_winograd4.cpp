#include "cpu/kernels/conv2d_winograd.h"

namespace fastdiff::CPU_CAPABILITY {

void conv2d_winograd4(const Conv2d& p) { winograd<4, 3>(p); }

void conv2d_winograd4_pack(const float* weight, const int64_t* sizes, float* out, int64_t* size,
                           const Threads& threads) {
  winograd_pack<4, 3>(weight, sizes, out, size, threads);
}

}  // namespace fastdiff::CPU_CAPABILITY
