// C = A B in seven products of quarters (Strassen 1969, Numerische Mathematik 13, p. 354): an
// eighth fewer multiplications than gemm.h alone. The sums of B are packed, those of A are taken
// once for each block, and each product is added where it belongs as it leaves the registers.
//
// Quarters: A's upper and lower rows and its left and right half of k; of B's columns always
// two panels, the left and the right one.
//
// Accuracy in float32, relative L2 against float64, for k = 64 / 1280 / 5120 of zero mean: direct
// 1.1e-7 / 2.4e-7 / 2.6e-7, this 1.6e-7 / 4.7e-7 / 5.0e-7. Where means are 100 times the deviation
// it stays under 1e-6 (tests/ops/test_conv2d_pointwise.py). A row's errors are relative to the
// larger of the two rows that are added up, one of each half.
#pragma once

#include "cpu/kernels/gemm.h"

namespace fastdiff::CPU_CAPABILITY {

constexpr int64_t kPair = 2 * kPanel;  // columns of B at a time

// Where a band's sums go if two quarters of C need them: c += or -= sums, and d += sums. What is
// not to be kept is replaced.
template <int sign, bool kKeepFirst, bool kKeepSecond>
struct IntoBoth {
  float *c, *d;
  int64_t ld;

  IntoBoth below(int64_t rows) const { return {c + rows * ld, d + rows * ld, ld}; }

  FASTDIFF_INLINE void write(int m, int v, F sum) const {
    float *first = c + m * ld + v * kLanes, *second = d + m * ld + v * kLanes;
    const F signed_sum = sign > 0 ? sum : -sum;
    store_lanes(first, kKeepFirst ? load_lanes(first) + signed_sum : signed_sum);
    store_lanes(second, kKeepSecond ? load_lanes(second) + sum : sum);
  }
};

// Rows of A: `half` upper ones, as many lower ones, and the sums of both.
struct Quarters {
  int64_t half, depth;
  const float *const *rows, *const *sums;
};

constexpr int64_t kSums = 5;

inline int64_t strassen_sums_ld(int64_t depth) { return kSums * (depth / 2) + kLine; }

// The sums of an upper and a lower row, [5, depth / 2]; depth / 2 is whole vectors.
inline void strassen_sums(const float* upper, const float* lower, int64_t depth, float* out) {
  const int64_t half = depth / 2;
  for (int64_t k = 0; k < half; k += kLanes) {
    const F a11 = load_lanes(upper + k), a12 = load_lanes(upper + half + k),
            a21 = load_lanes(lower + k), a22 = load_lanes(lower + half + k);
    store_lanes(out + k, a11 + a22);
    store_lanes(out + half + k, a21 + a22);
    store_lanes(out + 2 * half + k, a11 + a12);
    store_lanes(out + 3 * half + k, a21 - a11);
    store_lanes(out + 4 * half + k, a12 - a22);
  }
}

// c [2 half, kPair] = A times two panels of B.
inline void multiply_strassen(const Quarters& a, const float* b, float* c, int64_t ld) {
  const int64_t depth = a.depth / 2;
  float *c11 = c, *c12 = c + kPanel, *c21 = c + a.half * ld, *c22 = c21 + kPanel;
  const auto sums = [&](int64_t which) { return which * depth; };
  const auto product = [&](const float* const* rows, int64_t offset, auto first, auto further) {
    for (int64_t k = 0; k < depth; k += kDepth) {
      const int64_t deep = std::min(kDepth, depth - k);
      const Next next{b + deep * kPanel};
      if (k == 0) {
        multiply_bands<kVectors>(a.half, rows, offset, deep, b, next, first);
      } else {
        multiply_bands<kVectors>(a.half, rows, offset + k, deep, b, next, further);
      }
      b = next.b;
    }
  };
  const auto alone = [&](float* to) { return Into{to, ld, true}; };
  using Plus = IntoBoth<1, true, true>;
  using Minus = IntoBoth<-1, true, true>;
  product(a.sums, sums(0), IntoBoth<1, false, false>{c11, c22, ld}, Plus{c11, c22, ld});
  product(a.sums, sums(1), IntoBoth<-1, true, false>{c22, c21, ld}, Minus{c22, c21, ld});
  product(a.sums, sums(2), IntoBoth<-1, true, false>{c11, c12, ld}, Minus{c11, c12, ld});
  product(a.rows, 0, Plus{c22, c12, ld}, Plus{c22, c12, ld});
  product(a.rows + a.half, depth, Plus{c11, c21, ld}, Plus{c11, c21, ld});
  product(a.sums, sums(3), alone(c22), alone(c22));
  product(a.sums, sums(4), alone(c11), alone(c11));
}

inline int64_t strassen_packed(int64_t depth, int64_t columns) {
  return rounded_up(columns, kPair) * depth / 4 * 7;
}

// Rows begin..end of each product's [depth / 2, kPanel], of two panels of B, of which
// `value(k, column)` is an element. A sum of two floats is rounded once.
template <class Value>
void strassen_pack(int64_t depth, int64_t begin, int64_t end, float* out, Value&& value) {
  const int64_t half = depth / 2;
  for (int64_t k = begin; k < end; ++k) {
    float b11[kPanel], b12[kPanel], b21[kPanel], b22[kPanel];
    for (int64_t j = 0; j < kPanel; ++j) {
      b11[j] = value(k, j), b12[j] = value(k, j + kPanel);
      b21[j] = value(k + half, j), b22[j] = value(k + half, j + kPanel);
    }
    float* row = out + k * kPanel;
    const auto product = [&](auto sum) {
      for (int64_t j = 0; j < kPanel; ++j) row[j] = sum(j);
      row += half * kPanel;
    };
    product([&](int64_t j) { return b11[j] + b22[j]; });
    product([&](int64_t j) { return b11[j]; });
    product([&](int64_t j) { return b22[j]; });
    product([&](int64_t j) { return b12[j] - b22[j]; });
    product([&](int64_t j) { return b21[j] - b11[j]; });
    product([&](int64_t j) { return b11[j] + b12[j]; });
    product([&](int64_t j) { return b21[j] + b22[j]; });
  }
}

}  // namespace fastdiff::CPU_CAPABILITY
