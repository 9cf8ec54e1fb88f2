// How rows of queries, keys, values and gradients become operands of products.h.
#pragma once

#include "cpu/kernels/bf16/products.h"

namespace fastdiff::CPU_CAPABILITY {

constexpr int64_t whole(int64_t count) { return (count + kColumns - 1) / kColumns * kColumns; }

// Writes the first `count` of 32 values, and zeros behind them.
FASTDIFF_INLINE void load_line(const bf16* from, int64_t count, void* to) {
  using At = at::vec::Vectorized<bf16>;
  for (int64_t i = 0; i < kColumns; i += At::size())
    At::loadu(from + i, std::clamp<int64_t>(count - i, 0, At::size()))
        .store(static_cast<bf16*>(to) + i);
}

// B of products with the rows: [32 rows][step][2 halves][16 pairs][16 rows][2], in whole steps of
// rows, the last of which is repeated. 16 rows by 16 pairs are transposed at a time, where a float
// is only a pair's 32 bits.
inline void pack_turned(const bf16* from, int64_t stride, int64_t rows, int64_t width, bf16* out) {
  float* to = reinterpret_cast<float*>(out);
  for (int64_t first = 0; first < rows; first += kColumns)
    for (int64_t d = 0; d < width; d += kColumns)
      for (int64_t half = 0; half < kColumns; half += 16, to += kStepValues / 4) {
        float pairs[16 * 16];
        for (int64_t j = 0; j < 16; ++j)
          load_line(from + std::min(first + half + j, rows - 1) * stride + d, width - d,
                    pairs + j * 16);
        at::vec::transpose_mxn<float, 16, 16>(pairs, 16, to, 16);
      }
}

// Writes the pairs of 16 columns that two rows have.
FASTDIFF_INLINE void pack_pairs(const bf16* even, const bf16* odd, bf16* to) {
  using Bits = uint32_t __attribute__((vector_size(sizeof(F))));
  for (int64_t c = 0; c < 16; c += kLanes) {
    // A bfloat16 is the upper half of a float.
    const auto low = reinterpret_cast<Bits>(load_lanes(even + c)) >> 16;
    const auto high = reinterpret_cast<Bits>(load_lanes(odd + c));
    const Bits both = low | high;
    __builtin_memcpy(to + c * 2, &both, sizeof both);
  }
}

// B of products whose depth are the rows: [32 columns][step][2 halves][16 pairs of rows][16
// columns][2], with zeros up to whole steps of rows.
inline void pack_panels(const bf16* from, int64_t stride, int64_t rows, int64_t width, bf16* to) {
  for (int64_t first = 0; first < width; first += kColumns)
    for (int64_t row = 0; row < rows; row += kColumns, to += kStepValues)
      for (int64_t i = 0; i < kColumns; i += 2) {
        const bf16* at = from + (row + i) * stride + first;
        bf16 even[kColumns], odd[kColumns];
        load_line(at, row + i < rows ? width - first : 0, even);
        load_line(at + stride, row + i + 1 < rows ? width - first : 0, odd);
        for (int64_t c = 0; c < kColumns; c += 16)
          pack_pairs(even + c, odd + c, to + c / 16 * (kStepValues / 2) + i * 16);
      }
}

// C (+)= A B: up to 32 `rows` of A that lie lda apart, of `depth` columns that are not zero, and
// the first `columns` of a panel of B.
FASTDIFF_INLINE void multiply_rows(const bf16* a, int64_t lda, int64_t rows, int64_t depth,
                                   const bf16* b, int64_t columns, float* c, int64_t ld,
                                   bool accumulate) {
  static constexpr int64_t kTap = 0;
  const Walk walk{.spacing = lda * 2,
                  .plane = kColumns * 2,
                  .taps = 1,
                  .tap = &kTap,
                  .last_pairs = pairs_of_last_plane(depth)};
  const auto bytes = [](const bf16* at) { return reinterpret_cast<const char*>(at); };
  multiply({bytes(a), bytes(a + kGroup * lda), rows}, walk, whole(depth) / kColumns, bytes(b),
           columns, c, ld, accumulate);
}

}  // namespace fastdiff::CPU_CAPABILITY
