// C = A B for rows of A that lie anywhere and B packed in panels: what every convolution here comes
// down to. float32.
//
// A tile of C, kRows x kPanel, is kept in registers while k runs. Per k it takes kVectors loads of
// B and kRows broadcasts of A for kRows * kVectors multiply-adds, so that the multiply-add units
// and not the loads are the limit; the rows' addresses fit the 16 general registers of x86-64. B
// streams through L1, once for each kRows rows: a piece of kDepth by kPanel stays in L2 meanwhile.
#pragma once

#include "cpu/kernels/vectors.h"

namespace fastdiff::CPU_CAPABILITY {

constexpr int kRows = 6;
#if defined(CPU_CAPABILITY_AVX512) || defined(__aarch64__)  // 32 vector registers
constexpr int kVectors = 4, kMostVectors = 4;
#else
constexpr int kVectors = 2, kMostVectors = 3;
#endif
constexpr int64_t kPanel = kVectors * kLanes;  // columns of a panel of B
constexpr int64_t kDepth = 384;                // of k at a time
constexpr int64_t kAhead = 32 * kLine;         // floats of B that are on their way from memory

constexpr int64_t rounded_up(int64_t value, int64_t step) {
  return (value + step - 1) / step * step;
}

// Columns of the next panel where `left` are left and panels may differ: a last vector alone would
// leave units idle, so it goes with the panel before where registers allow it.
inline int64_t panel_columns(int64_t left) {
  return std::min(left, left > kMostVectors * kLanes ? kPanel : kMostVectors * kLanes);
}

// Columns that B's last panel takes up: whole vectors. B of `depth` rows and `columns` columns is
// depth * packed_columns(columns) floats; panel p begins at p * kPanel * depth.
constexpr int64_t packed_columns(int64_t columns) { return rounded_up(columns, kLanes); }

// Where a tile's sums go: into c, or to what is there.
struct Into {
  float* c;
  int64_t ld;
  bool accumulate;

  Into below(int64_t rows) const { return {c + rows * ld, ld, accumulate}; }

  FASTDIFF_INLINE void write(int m, int v, F sum) const {
    float* out = c + m * ld + v * kLanes;
    // Added at the end: a sum in pieces rounds less than one long chain.
    store_lanes(out, accumulate ? load_lanes(out) + sum : sum);
  }
};

template <int M, int V, class Out>
FASTDIFF_INLINE void micro_kernel(const float* const* rows, int64_t offset, int64_t depth,
                                  const float* b, const Out& out) {
  F acc[M][V];
  const float* a[M];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
    a[m] = rows[m] + offset;
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) acc[m][v] = F{};
  }
  for (int64_t k = 0; k < depth; ++k) {
    F column[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      column[v] = load_lanes(b + (k * V + v) * kLanes);
      if ((v * kLanes) % kLine == 0) __builtin_prefetch(b + (k * V + v) * kLanes + kAhead);
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) acc[m][v] += a[m][k] * column[v];
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) out.write(m, v, acc[m][v]);
  }
}

template <int V, class Out>
inline void multiply_rows(int64_t m, const float* const* rows, int64_t offset, int64_t depth,
                          const float* b, const Out& out) {
  switch (m) {
    case 1:
      return micro_kernel<1, V>(rows, offset, depth, b, out);
    case 2:
      return micro_kernel<2, V>(rows, offset, depth, b, out);
    case 3:
      return micro_kernel<3, V>(rows, offset, depth, b, out);
    case 4:
      return micro_kernel<4, V>(rows, offset, depth, b, out);
    default:
      if constexpr (V <= kVectors) {
        if (m == 5) return micro_kernel<5, V>(rows, offset, depth, b, out);
        return micro_kernel<6, V>(rows, offset, depth, b, out);
      }
  }
}

// A [m, depth] times one panel of B: `columns` is at most kMostVectors vectors, and `out` is
// written for whole vectors of columns. Row i of A begins at rows[i] + offset.
template <class Out>
inline void multiply_panel(int64_t m, const float* const* rows, int64_t offset, int64_t depth,
                           const float* b, int64_t columns, const Out& out) {
  // Blocks of nearly the same height: 8 rows as 4 and 4, since 6 and 2 would leave units idle.
  const int64_t vectors = (columns + kLanes - 1) / kLanes;
  const int64_t most = vectors > kVectors ? kRows * kVectors / kMostVectors : kRows;
  const int64_t blocks = (m + most - 1) / most;
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t begin = m * block / blocks, count = m * (block + 1) / blocks - begin;
    const Out below = out.below(begin);
    switch (vectors) {
      case 1:
        multiply_rows<1>(count, rows + begin, offset, depth, b, below);
        break;
      case 2:
        multiply_rows<2>(count, rows + begin, offset, depth, b, below);
        break;
      case 3:
        multiply_rows<3>(count, rows + begin, offset, depth, b, below);
        break;
      default:
        if constexpr (kMostVectors > 3)
          multiply_rows<4>(count, rows + begin, offset, depth, b, below);
    }
  }
}

}  // namespace fastdiff::CPU_CAPABILITY
