#include "cpu/kernels/bf16/conv2d_direct.h"

namespace fastdiff::CPU_CAPABILITY {

void conv2d_direct_bf16(const Conv2d& p) { DirectBf16<bf16, 1>(p).run(); }

void conv2d_direct_bf16_pack(const ConvWeight& size, const float* weight, void* packed,
                             int64_t* count, const Threads& threads) {
  pack_direct_bf16<1>(size, weight, packed, count, threads);
}

void conv2d_split(const Conv2d& p) { DirectBf16<float, 2>(p).run(); }

void conv2d_split_pack(const ConvWeight& size, const float* weight, void* packed, int64_t* count,
                       const Threads& threads) {
  pack_direct_bf16<2>(size, weight, packed, count, threads);
}

}  // namespace fastdiff::CPU_CAPABILITY
