// C = A B for rows of A that lie anywhere and B packed in panels: what every convolution here comes
// down to. float32.
//
// The sums of a band of A with a panel of B, kRows x kPanel, are kept in registers while k runs.
// Each k takes kVectors loads of B and kRows broadcasts of A for kRows * kVectors multiply-adds, so
// that multiply-adds and not loads are the limit; the addresses of a band's rows fit the 16 general
// registers of x86-64. B streams through L1 once for each band; kDepth rows of a panel stay in L2
// meanwhile.
//
// Weights come from memory at every call, since all of a U-Net's are more than any cache holds. So
// while kDepth rows of a panel are multiplied, the next kDepth are prefetched a little at a time:
// if the first band fetched them, it would wait for the memory, which all other bands leave idle.
//
// Instructions count as well. Where two threads share a core, its decoder gives three instructions
// a cycle to each, and 24 of them for 12 multiply-adds of AVX2 then take 8 cycles instead of 6. So
// k is unrolled, and nothing is prefetched twice.
#pragma once

#include <type_traits>

#include "cpu/kernels/vectors.h"

namespace fastdiff::CPU_CAPABILITY {

constexpr int kRows = 6;
#if defined(CPU_CAPABILITY_AVX512) || defined(__aarch64__)  // 32 vector registers
constexpr int kVectors = 4, kMostVectors = 4;
#else
constexpr int kVectors = 2, kMostVectors = 3;
#endif
constexpr int64_t kPanel = kVectors * kLanes;  // columns of a panel of B
constexpr int64_t kDepth = 384;                // rows of a panel that are multiplied at a time

// How many k are unrolled. Where the sums take all registers, more than two would spill them.
constexpr int steps(int vectors) { return vectors <= kVectors ? 4 : 2; }

// Columns of the next panel where `left` columns are left and panels may differ in width. A single
// last vector would not keep the multiply-adds busy, so it joins the panel before it where there
// are registers for that.
inline int64_t panel_columns(int64_t left) {
  return std::min(left, left > kMostVectors * kLanes ? kPanel : kMostVectors * kLanes);
}

// Columns that B's last panel takes up: whole vectors. B of `depth` rows and `columns` columns is
// depth * packed_columns(columns) floats; panel p begins at p * kPanel * depth.
constexpr int64_t packed_columns(int64_t columns) { return rounded_up(columns, kLanes); }

// Where a band's sums go: they replace the values in c, or are added to them.
struct Into {
  float* c;
  int64_t ld;
  bool accumulate;

  Into below(int64_t rows) const { return {c + rows * ld, ld, accumulate}; }

  FASTDIFF_INLINE void write(int m, int v, F sum) const {
    float* out = c + m * ld + v * kLanes;
    // Added at the end, since sums of kDepth products each round less than one long chain.
    store_lanes(out, accumulate ? load_lanes(out) + sum : sum);
  }
};

// What will be multiplied next, and is prefetched into L2 meanwhile: rows of a panel of B, as many
// as are multiplied now, and as many floats of A, or null.
struct Next {
  const float *b, *a = nullptr;
};

// A band of M rows times V vectors of a panel. Prefetches kFetch cache lines from `next` on for
// each steps(V) of k.
template <int M, int V, int kFetch, class Out>
FASTDIFF_INLINE void micro_kernel(const float* const* rows, int64_t offset, int64_t depth,
                                  const float* b, const float* next, const Out out) {
  constexpr int64_t kSteps = steps(V), kWidth = V * kLanes;
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
    for (int v = 0; v < V; ++v) column[v] = load_lanes(line + v * kLanes);
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
#pragma GCC unroll 16
    for (int i = 0; i < kFetch; ++i, next += kLine) __builtin_prefetch(next, 0, 2);
  }
  for (; k < depth; ++k, b += kWidth) add(k, b);
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) out.write(m, v, acc[m][v]);
  }
}

template <int V, int kFetch, class Out>
inline void multiply_band(int64_t m, const float* const* rows, int64_t offset, int64_t depth,
                          const float* b, const float* next, const Out& out) {
  switch (m) {
    case 1:
      return micro_kernel<1, V, kFetch>(rows, offset, depth, b, next, out);
    case 2:
      return micro_kernel<2, V, kFetch>(rows, offset, depth, b, next, out);
    case 3:
      return micro_kernel<3, V, kFetch>(rows, offset, depth, b, next, out);
    case 4:
      return micro_kernel<4, V, kFetch>(rows, offset, depth, b, next, out);
    default:
      if constexpr (V <= kVectors) {
        if (m == 5) return micro_kernel<5, V, kFetch>(rows, offset, depth, b, next, out);
        return micro_kernel<6, V, kFetch>(rows, offset, depth, b, next, out);
      }
  }
}

// Divides m rows into bands of nearly the same height: 8 rows as 4 and 4, since a band of 2 would
// not keep the multiply-adds busy. If there are enough bands, four of them prefetch a quarter each
// of what is next in B, and four more of what is next in A.
template <int V, class Out>
inline void multiply_bands(int64_t m, const float* const* rows, int64_t offset, int64_t depth,
                           const float* b, const Next& next, const Out& out) {
  constexpr int64_t most = V > kVectors ? kRows * kVectors / kMostVectors : kRows;
  constexpr int kLines = static_cast<int>(steps(V) * V * kLanes / kLine);  // of B, for each step
  constexpr int kQuarter = kLines / std::min(kLines, 4), kHalf = kLines / std::min(kLines, 2);
  const int64_t bands = (m + most - 1) / most, least = m / bands, larger = m % bands;
  const int64_t lines = bands * kQuarter >= kLines ? kQuarter : bands > 1 ? kHalf : kLines;
  const int64_t shares = kLines / lines, share = depth / steps(V) * lines * kLine;
  for (int64_t band = 0, at = 0, count; band < bands; ++band, at += count) {
    count = least + (band < larger);
    const float* from = band < shares ? next.b : band < 2 * shares ? next.a : nullptr;
    if (from) from += band % shares * share;
    const auto multiply = [&](auto fetch) {
      multiply_band<V, decltype(fetch)::value>(count, rows + at, offset, depth, b, from,
                                               out.below(at));
    };
    if (!from) {
      multiply(std::integral_constant<int, 0>{});
    } else if (lines == kQuarter) {
      multiply(std::integral_constant<int, kQuarter>{});
    } else if (lines == kHalf) {
      multiply(std::integral_constant<int, kHalf>{});
    } else {
      multiply(std::integral_constant<int, kLines>{});
    }
  }
}

// A [m, depth] times one panel of B: `columns` is at most kMostVectors vectors, and `out` is
// written for whole vectors of columns. Row i of A begins at rows[i] + offset.
template <class Out>
inline void multiply_panel(int64_t m, const float* const* rows, int64_t offset, int64_t depth,
                           const float* b, int64_t columns, const Next& next, const Out& out) {
  switch ((columns + kLanes - 1) / kLanes) {
    case 1:
      return multiply_bands<1>(m, rows, offset, depth, b, next, out);
    case 2:
      return multiply_bands<2>(m, rows, offset, depth, b, next, out);
    case 3:
      return multiply_bands<3>(m, rows, offset, depth, b, next, out);
    default:
      if constexpr (kMostVectors > 3)
        return multiply_bands<4>(m, rows, offset, depth, b, next, out);
  }
}

}  // namespace fastdiff::CPU_CAPABILITY
