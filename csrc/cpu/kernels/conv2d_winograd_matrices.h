// The matrices of Winograd's minimal filtering (Lavin & Gray 2016, arXiv:1509.09308), for
// conv2d_winograd.h.
#pragma once

#include "cpu/kernels/vectors.h"

namespace fastdiff::CPU_CAPABILITY {

// The matrices of F(m, r) for the first m + r - 2 points of 0, 1, -1, 2, -2, and infinity, in one
// dimension: input() is B^T, output() is A^T, and kWeight is G. For the gradient of a weight,
// gradient() is A and weight_gradient() is G^T.
template <int m, int r>
struct Filtering;

template <>
struct Filtering<2, 3> {
  static constexpr double kWeight[4][3] = {{1, 0, 0}, {.5, .5, .5}, {.5, -.5, .5}, {0, 0, 1}};

  static FASTDIFF_INLINE void input(const F* d, int64_t step, F* out, int64_t out_step) {
    const F a = d[0], b = d[step], c = d[2 * step], e = d[3 * step];
    out[0] = a - c;
    out[out_step] = b + c;
    out[2 * out_step] = c - b;
    out[3 * out_step] = e - b;
  }

  static FASTDIFF_INLINE void output(const F* d, int64_t step, F* out, int64_t out_step) {
    const F a = d[0], b = d[step], c = d[2 * step], e = d[3 * step];
    out[0] = a + b + c;
    out[out_step] = b - c + e;
  }

  static FASTDIFF_INLINE void gradient(const F* d, int64_t step, F* out, int64_t out_step) {
    const F a = d[0], b = d[step];
    out[0] = a;
    out[out_step] = a + b;
    out[2 * out_step] = a - b;
    out[3 * out_step] = b;
  }

  static FASTDIFF_INLINE void weight_gradient(const F* d, int64_t step, F* out, int64_t out_step) {
    const F a = d[0], b = d[step], c = d[2 * step], e = d[3 * step];
    const F sum = .5f * (b + c);
    out[0] = a + sum;
    out[out_step] = .5f * (b - c);
    out[2 * out_step] = sum + e;
  }
};

template <>
struct Filtering<4, 2> {
  static constexpr double kWeight[5][2] = {
      {1. / 2, 0}, {-1. / 2, -1. / 2}, {-1. / 6, 1. / 6}, {1. / 6, 1. / 3}, {0, 1}};

  static FASTDIFF_INLINE void input(const F* d, int64_t step, F* out, int64_t out_step) {
    const F a = d[0], b = d[step], c = d[2 * step], e = d[3 * step], f = d[4 * step];
    const F outer = e - b;
    out[0] = 2.f * (a - c) + outer;
    out[out_step] = outer - (b + c);
    out[2 * out_step] = e + 2.f * b - 3.f * c;
    out[3 * out_step] = outer;
    out[4 * out_step] = f - c - 2.f * outer;
  }

  static FASTDIFF_INLINE void output(const F* d, int64_t step, F* out, int64_t out_step) {
    const F a = d[0], b = d[step], c = d[2 * step], e = d[3 * step], f = d[4 * step];
    const F sum = b + c, difference = b - c;
    out[0] = a + sum + e;
    out[out_step] = difference + 2.f * e;
    out[2 * out_step] = sum + 4.f * e;
    out[3 * out_step] = difference + 8.f * e + f;
  }
};

template <>
struct Filtering<4, 3> {
  static constexpr double kWeight[6][3] = {{1. / 4, 0, 0},
                                           {-1. / 6, -1. / 6, -1. / 6},
                                           {-1. / 6, 1. / 6, -1. / 6},
                                           {1. / 24, 1. / 12, 1. / 6},
                                           {1. / 24, -1. / 12, 1. / 6},
                                           {0, 0, 1}};

  static FASTDIFF_INLINE void input(const F* d, int64_t step, F* out, int64_t out_step) {
    const F a = d[0], b = d[step], c = d[2 * step], e = d[3 * step], f = d[4 * step],
            g = d[5 * step];
    const F even = f - 4.f * c, odd = e - 4.f * b, outer = f - c, inner = 2.f * (e - b);
    out[0] = 4.f * a - 5.f * c + f;
    out[out_step] = even + odd;
    out[2 * out_step] = even - odd;
    out[3 * out_step] = outer + inner;
    out[4 * out_step] = outer - inner;
    out[5 * out_step] = 4.f * b - 5.f * e + g;
  }

  static FASTDIFF_INLINE void output(const F* d, int64_t step, F* out, int64_t out_step) {
    const F a = d[0], b = d[step], c = d[2 * step], e = d[3 * step], f = d[4 * step],
            g = d[5 * step];
    const F sum = b + c, difference = b - c, sum2 = e + f, difference2 = e - f;
    out[0] = a + sum + sum2;
    out[out_step] = difference + 2.f * difference2;
    out[2 * out_step] = sum + 4.f * sum2;
    out[3 * out_step] = difference + 8.f * difference2 + g;
  }

  static FASTDIFF_INLINE void gradient(const F* d, int64_t step, F* out, int64_t out_step) {
    const F a = d[0], b = d[step], c = d[2 * step], e = d[3 * step];
    const F even = a + c, odd = b + e, even2 = a + 4.f * c, odd2 = 2.f * b + 8.f * e;
    out[0] = a;
    out[out_step] = even + odd;
    out[2 * out_step] = even - odd;
    out[3 * out_step] = even2 + odd2;
    out[4 * out_step] = even2 - odd2;
    out[5 * out_step] = e;
  }

  static FASTDIFF_INLINE void weight_gradient(const F* d, int64_t step, F* out, int64_t out_step) {
    const F a = d[0], b = d[step], c = d[2 * step], e = d[3 * step], f = d[4 * step],
            g = d[5 * step];
    constexpr float kSixth = 1.f / 6;
    const F sum = kSixth * (b + c), sum2 = kSixth * (e + f);
    out[0] = .25f * (a + sum2) - sum;
    out[out_step] = kSixth * (c - b) + .5f * kSixth * (e - f);
    out[2 * out_step] = sum2 - sum + g;
  }
};

}  // namespace fastdiff::CPU_CAPABILITY
