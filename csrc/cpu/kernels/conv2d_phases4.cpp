#include "cpu/kernels/conv2d_winograd.h"

namespace fastdiff::CPU_CAPABILITY {

void conv2d_phases4(const Conv2d& p) { winograd<4, 2>(p); }

void conv2d_phases4_pack(const float* weight, const int64_t* sizes, float* out, int64_t* size,
                         const Threads& threads) {
  winograd_pack<4, 2>(weight, sizes, out, size, threads);
}

}  // namespace fastdiff::CPU_CAPABILITY
