// C = A B for rows of A that lie anywhere and B packed in panels: what every convolution here comes
// down to. float32.
//
// A tile of C, kRows x kPanel, is kept in registers while k runs. Per k it takes kVectors loads of
// B and kRows broadcasts of A for kRows * kVectors multiply-adds, so that the multiply-add units
// and not the loads are the limit; the rows' addresses fit the 16 general registers of x86-64. B
// streams through L1, once for each kRows rows: a piece of kDepth by kPanel stays in L2 meanwhile.
//
// Instructions count as well: where another thread has its share of the core, the decoder gives
// three a cycle, and 24 of them for 12 multiply-adds of AVX2 then take 8 cycles in the place of 6.
// So k is unrolled, and only the first rows fetch B.
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

// With kFetch what follows in B is asked of the memory meanwhile.
template <int M, int V, bool kFetch, class Out>
FASTDIFF_INLINE void micro_kernel(const float* const* rows, int64_t offset, int64_t depth,
                                  const float* b, const Out out) {
  // Of k between two looks at how far it is; where all registers are taken, more would spill them.
  constexpr int64_t kSteps = V <= kVectors ? 4 : 2, kWidth = V * kLanes;
  F acc[M][V];
  const float* a[M];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
    a[m] = rows[m] + offset;
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) acc[m][v] = F{};
  }
  const auto add = [&](int64_t k, const float* line) FASTDIFF_HOT {
    F column[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      column[v] = load_lanes(line + v * kLanes);
      if (kFetch && v * kLanes % kLine == 0) __builtin_prefetch(line + v * kLanes + kAhead);
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) acc[m][v] += a[m][k] * column[v];
    }
  };
  int64_t k = 0;
  for (; k + kSteps <= depth; k += kSteps, b += kSteps * kWidth) {
#pragma GCC unroll 8
    for (int64_t i = 0; i < kSteps; ++i) add(k + i, b + i * kWidth);
  }
  for (; k < depth; ++k, b += kWidth) add(k, b);
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) out.write(m, v, acc[m][v]);
  }
}

template <int V, bool kFetch, class Out>
inline void multiply_rows(int64_t m, const float* const* rows, int64_t offset, int64_t depth,
                          const float* b, const Out& out) {
  switch (m) {
    case 1:
      return micro_kernel<1, V, kFetch>(rows, offset, depth, b, out);
    case 2:
      return micro_kernel<2, V, kFetch>(rows, offset, depth, b, out);
    case 3:
      return micro_kernel<3, V, kFetch>(rows, offset, depth, b, out);
    case 4:
      return micro_kernel<4, V, kFetch>(rows, offset, depth, b, out);
    default:
      if constexpr (V <= kVectors) {
        if (m == 5) return micro_kernel<5, V, kFetch>(rows, offset, depth, b, out);
        return micro_kernel<6, V, kFetch>(rows, offset, depth, b, out);
      }
  }
}

// Blocks of nearly the same height: 8 rows as 4 and 4, since 6 and 2 would leave units idle. The
// first one brings B into the cache for all.
template <int V, class Out>
inline void multiply_blocks(int64_t m, const float* const* rows, int64_t offset, int64_t depth,
                            const float* b, const Out& out) {
  constexpr int64_t most = V > kVectors ? kRows * kVectors / kMostVectors : kRows;
  const int64_t blocks = (m + most - 1) / most, least = m / blocks, larger = m % blocks;
  const int64_t first = least + (larger > 0);
  multiply_rows<V, true>(first, rows, offset, depth, b, out);
  for (int64_t block = 1, at = first, count; block < blocks; ++block, at += count) {
    count = least + (block < larger);
    multiply_rows<V, false>(count, rows + at, offset, depth, b, out.below(at));
  }
}

// A [m, depth] times one panel of B: `columns` is at most kMostVectors vectors, and `out` is
// written for whole vectors of columns. Row i of A begins at rows[i] + offset.
template <class Out>
inline void multiply_panel(int64_t m, const float* const* rows, int64_t offset, int64_t depth,
                           const float* b, int64_t columns, const Out& out) {
  switch ((columns + kLanes - 1) / kLanes) {
    case 1:
      return multiply_blocks<1>(m, rows, offset, depth, b, out);
    case 2:
      return multiply_blocks<2>(m, rows, offset, depth, b, out);
    case 3:
      return multiply_blocks<3>(m, rows, offset, depth, b, out);
    default:
      if constexpr (kMostVectors > 3) return multiply_blocks<4>(m, rows, offset, depth, b, out);
  }
}

}  // namespace fastdiff::CPU_CAPABILITY
