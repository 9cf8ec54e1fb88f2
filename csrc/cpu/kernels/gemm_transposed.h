// C = A^T B, summed over the rows of A and B: what the gradient of a weight comes down to. float32.
//
// Rows of A lie evenly, and those of B anywhere, so that they may be windows of an image. As in
// gemm.h the sums of at most kRows x kPanel numbers of C are kept in registers, here while the rows
// are walked: each takes kVectors loads of B and kRows broadcasts of numbers of A that lie side by
// side. C is read and written once a call, so that more rows a call cost less; but the rows' panel
// of B, kPanel of each, is read again for every kRows columns of A, and should stay in L2.
#pragma once

#include "cpu/kernels/gemm.h"

namespace fastdiff::CPU_CAPABILITY {

// M columns of A times V vectors of B.
template <int M, int V>
FASTDIFF_INLINE void transposed_kernel(int64_t rows, const float* a, int64_t a_ld,
                                       const float* const* b, int64_t offset, const Into out) {
  F sums[M][V];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      sums[m][v] = F{};
      // C comes from a further cache, while the products are computed.
      __builtin_prefetch(out.c + m * out.ld + v * kLanes, 1);
    }
  for (int64_t t = 0; t < rows; ++t, a += a_ld) {
    const float* from = b[t] + offset;
    F line[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) line[v] = load_lanes(from + v * kLanes);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sums[m][v] += a[m] * line[v];
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) out.write(m, v, sums[m][v]);
}

template <int V>
inline void multiply_transposed_panel(int64_t rows, const float* a, int64_t a_ld, int64_t columns,
                                      const float* const* b, int64_t offset, const Into& out) {
  // Bands of nearly the same height: a band of few would not keep the multiply-adds busy.
  const int64_t bands = (columns + kRows - 1) / kRows, least = columns / bands,
                larger = columns % bands;
  for (int64_t band = 0, at = 0, count; band < bands; ++band, at += count) {
    count = least + (band < larger);
    const auto multiply = [&]<int M>(std::integral_constant<int, M>) {
      transposed_kernel<M, V>(rows, a + at, a_ld, b, offset, out.below(at));
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

// C [m, n] of A [rows, m], whose rows are a_ld apart, and B [rows, n], whose row i begins at
// b[i] + offset. B is read and `out` written for whole vectors of the n columns.
inline void multiply_transposed(int64_t rows, const float* a, int64_t a_ld, int64_t m,
                                const float* const* b, int64_t offset, int64_t n, const Into& out) {
  for (int64_t j = 0; j < n; j += kPanel) {
    const Into panel{out.c + j, out.ld, out.accumulate};
    switch ((std::min(kPanel, n - j) + kLanes - 1) / kLanes) {
      case 1:
        multiply_transposed_panel<1>(rows, a, a_ld, m, b, offset + j, panel);
        break;
      case 2:
        multiply_transposed_panel<2>(rows, a, a_ld, m, b, offset + j, panel);
        break;
      default:
        if constexpr (kVectors == 4) {
          if (n - j <= 3 * kLanes) {
            multiply_transposed_panel<3>(rows, a, a_ld, m, b, offset + j, panel);
          } else {
            multiply_transposed_panel<4>(rows, a, a_ld, m, b, offset + j, panel);
          }
        }
    }
  }
}

}  // namespace fastdiff::CPU_CAPABILITY
