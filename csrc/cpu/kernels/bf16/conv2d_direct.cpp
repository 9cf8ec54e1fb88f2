#include "cpu/kernels/bf16/conv2d_direct.h"

#include "cpu/kernels/conv2d_phases.h"

namespace fastdiff::CPU_CAPABILITY {
namespace {

template <int kParts>
void pack(const ConvWeight& size, const float* weight, void* packed, int64_t* count,
          const Threads& threads) {
  *count = packed_values<kParts>(size);
  if (!packed) return;
  pack_bf16<kParts>(size, packed, threads, [&](int64_t k, int64_t c) {
    return weight + (k * size.channels + c) * size.kernel_h * size.kernel_w;
  });
}

// The taps of a phase's kernel.
struct PhaseTaps {
  float sum[2][2];

  PhaseTaps(const float* weight, int64_t which) {
    double whole[9], of_phase[2][2];
    for (int t = 0; t < 9; ++t) whole[t] = weight[t];
    phase_taps<2>(whole, which, of_phase);
    for (int t = 0; t < 4; ++t) sum[t / 2][t % 2] = static_cast<float>(of_phase[t / 2][t % 2]);
  }

  float operator[](int64_t t) const { return sum[t / 2][t % 2]; }
};

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
    pack_bf16<1>(phase, static_cast<bf16*>(packed) + which * each, threads,
                 [&](int64_t k, int64_t c) {
                   return PhaseTaps(weight + (k * size.channels + c) * 9, which);
                 });
}

}  // namespace fastdiff::CPU_CAPABILITY
