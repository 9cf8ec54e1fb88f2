// C = A^T B, summed over the rows of A and B: what the gradient of a weight comes down to. float32.
//
// Rows lie anywhere, so that they may be windows of an image. As in
// gemm.h the sums of at most kRows x kPanel numbers of C are kept in registers, here while the rows
// are walked: each takes kVectors loads of B and kRows broadcasts of numbers of A that lie side by
// side. C is read and written once a call, so that more rows a call cost less; but the rows' panel
// of B, kPanel of each, is read again for every kRows columns of A, and should stay in L2.
#pragma once

#include "cpu/kernels/gemm.h"

namespace fastdiff::CPU_CAPABILITY {

// Rows of a matrix: row t begins at starts[t] + offset.
struct Rows {
  const float* const* starts;
  int64_t offset;

  FASTDIFF_INLINE const float* at(int64_t t) const { return starts[t] + offset; }
  Rows from(int64_t column) const { return {starts, offset + column}; }
};

// M columns of A times V vectors of B.
template <int M, int V>
FASTDIFF_INLINE void transposed_kernel(int64_t rows, const Rows& a, const Rows& b, const Into out) {
  F sums[M][V];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      sums[m][v] = F{};
      // C comes from a further cache, while the products are computed.
      __builtin_prefetch(out.c + m * out.ld + v * kLanes, 1);
    }
  for (int64_t t = 0; t < rows; ++t) {
    const float *numbers = a.at(t), *from = b.at(t);
    F line[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) line[v] = load_lanes(from + v * kLanes);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sums[m][v] += numbers[m] * line[v];
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) out.write(m, v, sums[m][v]);
}

template <int V>
inline void multiply_transposed_panel(int64_t rows, const Rows& a, int64_t columns, const Rows& b,
                                      const Into& out) {
  // Bands of nearly the same height: a band of few would not keep the multiply-adds busy.
  const int64_t bands = (columns + kRows - 1) / kRows, least = columns / bands,
                larger = columns % bands;
  for (int64_t band = 0, at = 0, count; band < bands; ++band, at += count) {
    count = least + (band < larger);
    const auto multiply = [&]<int M>(std::integral_constant<int, M>) {
      transposed_kernel<M, V>(rows, a.from(at), b, out.below(at));
    };
    static_assert(kRows == 6);
    switch (count) {
      case 1:
        multiply(std::integral_constant<int, 1>{});
        break;
      case 2:
        multiply(std::integral_constant<int, 2>{});
        break;
      case 3:
        multiply(std::integral_constant<int, 3>{});
        break;
      case 4:
        multiply(std::integral_constant<int, 4>{});
        break;
      case 5:
        multiply(std::integral_constant<int, 5>{});
        break;
      default:
        multiply(std::integral_constant<int, 6>{});
    }
  }
}

// C [m, n] of A [rows, m] and B [rows, n]. B is read and `out` written for whole vectors of the n
// columns.
inline void multiply_transposed(int64_t rows, const Rows& a, int64_t m, const Rows& b, int64_t n,
                                const Into& out) {
  for (int64_t j = 0; j < n; j += kPanel) {
    const Into panel{out.c + j, out.ld, out.accumulate};
    switch ((std::min(kPanel, n - j) + kLanes - 1) / kLanes) {
      case 1:
        multiply_transposed_panel<1>(rows, a, m, b.from(j), panel);
        break;
      case 2:
        multiply_transposed_panel<2>(rows, a, m, b.from(j), panel);
        break;
      default:
        if constexpr (kVectors == 4) {
          if (n - j <= 3 * kLanes) {
            multiply_transposed_panel<3>(rows, a, m, b.from(j), panel);
          } else {
            multiply_transposed_panel<4>(rows, a, m, b.from(j), panel);
          }
        }
    }
  }
}

}  // namespace fastdiff::CPU_CAPABILITY
