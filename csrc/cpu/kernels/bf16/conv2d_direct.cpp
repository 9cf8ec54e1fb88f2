#include "cpu/kernels/bf16/conv2d_direct.h"

#include "cpu/kernels/conv2d_phases.h"

namespace fastdiff::CPU_CAPABILITY {
namespace {

using Block = WeightBlock<kColumns>;

template <int kParts>
void pack(const ConvWeight& size, const WeightValues& weight, void* packed, int64_t* count,
          const Threads& threads) {
  *count = packed_values<kParts>(size);
  if (!packed) return;
  pack_bf16<kParts>(size, packed, threads,
                    [&](Block& block, auto... part) { block.read(weight, part...); });
}

// Reads all taps of a 3x3 kernel, and leaves those of a phase's.
void read_phase(Block& block, const WeightValues& weight, int64_t which, int64_t first,
                int64_t filters, int64_t begin, int64_t end) {
  block.read(weight, first, filters, begin, end, 0, 9);
  for (int64_t c = 0; c < kPackedChannels; ++c)
    for (int64_t k = 0; k < kColumns; ++k) {
      double whole[9], of_phase[2][2];
      for (int t = 0; t < 9; ++t) whole[t] = block.rows[t][c][k];
      phase_taps<2>(whole, which, of_phase);
      for (int t = 0; t < 4; ++t) block.rows[t][c][k] = static_cast<float>(of_phase[t / 2][t % 2]);
    }
}

}  // namespace

void conv2d_direct_bf16(const Conv2d& p) { direct_bf16<bf16, 1>(p); }

void conv2d_direct_bf16_pack(const ConvWeight& size, const WeightValues& weight, void* packed,
                             int64_t* count, const Threads& threads) {
  pack<1>(size, weight, packed, count, threads);
}

void conv2d_split_bf16(const Conv2d& p) { direct_bf16<float, 2>(p); }

void conv2d_split_bf16_pack(const ConvWeight& size, const WeightValues& weight, void* packed,
                            int64_t* count, const Threads& threads) {
  pack<2>(size, weight, packed, count, threads);
}

void conv2d_phases_bf16(const Conv2d& p) { direct_phases_bf16<bf16>(p); }

void conv2d_phases_bf16_pack(const ConvWeight& size, const WeightValues& weight, void* packed,
                             int64_t* count, const Threads& threads) {
  ConvWeight phase = size;
  phase.kernel_h = phase.kernel_w = 2;
  const int64_t each = packed_values<1>(phase);
  *count = 4 * each;
  if (!packed) return;
  for (int64_t which = 0; which < 4; ++which)
    pack_bf16<1>(phase, static_cast<bf16*>(packed) + which * each, threads,
                 [&](Block& block, int64_t first, int64_t filters, int64_t begin, int64_t end,
                     auto...) { read_phase(block, weight, which, first, filters, begin, end); });
}

}  // namespace fastdiff::CPU_CAPABILITY
