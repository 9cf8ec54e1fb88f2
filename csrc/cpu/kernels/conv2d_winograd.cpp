#include "cpu/kernels/conv2d_winograd.h"

#include "cpu/kernels/conv2d_winograd_pack.h"

namespace fastdiff::CPU_CAPABILITY {

void conv2d_winograd2(const Conv2d& p) { winograd<2, 3>(p); }

void conv2d_winograd2_pack(const ConvWeight& size, const float* weight, void* packed,
                           int64_t* count, const Threads& threads) {
  winograd_pack<2, 3>(size, weight, packed, count, threads);
}

void conv2d_winograd4(const Conv2d& p) { winograd<4, 3>(p); }

void conv2d_winograd4_pack(const ConvWeight& size, const float* weight, void* packed,
                           int64_t* count, const Threads& threads) {
  winograd_pack<4, 3>(size, weight, packed, count, threads);
}

void conv2d_phases4(const Conv2d& p) { winograd<4, 2>(p); }

void conv2d_phases4_pack(const ConvWeight& size, const float* weight, void* packed, int64_t* count,
                         const Threads& threads) {
  winograd_pack<4, 2>(size, weight, packed, count, threads);
}

}  // namespace fastdiff::CPU_CAPABILITY
