#include "cpu/kernels/bf16/conv2d_direct.h"

#include "cpu/kernels/conv2d_winograd.h"

namespace fastdiff::CPU_CAPABILITY {

namespace {

template <int kParts>
void pack(const ConvWeight& size, const float* weight, void* packed, int64_t* count,
          const Threads& threads) {
  *count = packed_values<kParts>(size);
  if (!packed) return;
  pack_direct_bf16<kParts>(size, static_cast<bf16*>(packed), threads, [&](int64_t k, int64_t c) {
    return weight + (k * size.channels + c) * size.kernel_h * size.kernel_w;
  });
}

}  // namespace

void conv2d_direct_bf16(const Conv2d& p) { direct_bf16<bf16, 1>(p); }

void conv2d_direct_bf16_pack(const ConvWeight& size, const float* weight, void* packed,
                             int64_t* count, const Threads& threads) {
  pack<1>(size, weight, packed, count, threads);
}

void conv2d_split_bf16(const Conv2d& p) { direct_bf16<float, 2>(p); }

void conv2d_split_bf16_pack(const ConvWeight& size, const float* weight, void* packed,
                            int64_t* count, const Threads& threads) {
  pack<2>(size, weight, packed, count, threads);
}

void conv2d_phases_bf16(const Conv2d& p) { direct_phases_bf16<bf16>(p); }

void conv2d_phases_bf16_pack(const ConvWeight& size, const float* weight, void* packed,
                             int64_t* count, const Threads& threads) {
  ConvWeight phase = size;
  phase.kernel_h = phase.kernel_w = 2;
  const int64_t each = packed_values<1>(phase);
  *count = 4 * each;
  if (!packed) return;
  for (int64_t which = 0; which < 4; ++which)
    pack_direct_bf16<1>(phase, static_cast<bf16*>(packed) + which * each, threads,
                        [&](int64_t k, int64_t c) {
                          struct {
                            double tap[2][2];
                            float operator[](int64_t t) const {
                              return static_cast<float>(tap[t / 2][t % 2]);
                            }
                          } of;
                          taps<2>(weight + (k * size.channels + c) * 9, which, of.tap);
                          return of;
                        });
}

}  // namespace fastdiff::CPU_CAPABILITY
