// Rows of queries, keys, values and gradients: copied, transposed and multiplied with each other.
#pragma once

#include "cpu/kernels/vectors.h"

namespace fastdiff::CPU_CAPABILITY {

// to[i, c] = factor * from[i, c], rows of `width` columns.
template <class From, class To>
inline void copy_rows(const From* from, int64_t from_stride, int64_t rows, int64_t width,
                      float factor, To* to, int64_t to_stride) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t c = 0; c < width; c += kLanes)
      store_lanes(to + i * to_stride + c,
                  load_lanes(from + i * from_stride + c, width - c) * factor, width - c);
}

// to[d, i] = factor * from[i, d] for `rows` rows of `from` and `width` columns; zeros behind the
// rows up to whole vectors. The rows of `from` lie `stride` elements apart, those of `to` `ld`.
template <class T>
inline void transpose_rows(const T* from, int64_t stride, int64_t rows, int64_t width, float factor,
                           float* to, int64_t ld) {
  constexpr int kSide = static_cast<int>(kLanes);
  for (int64_t i = 0; i < rows; i += kLanes)
    for (int64_t d = 0; d < width; d += kLanes) {
      float square[kSide * kSide], turned[kSide * kSide];
      for (int64_t r = 0; r < kLanes; ++r) {
        const T* row = from + (i + r) * stride + d;
        store_lanes(square + r * kLanes, i + r < rows ? load_lanes(row, width - d) * factor : F{});
      }
      at::vec::transpose_mxn<float, kSide, kSide>(square, kLanes, turned, kLanes);
      for (int64_t c = 0; c < std::min(kLanes, width - d); ++c)
        store_lanes(to + (d + c) * ld + i, load_lanes(turned + c * kLanes));
    }
}

// dots[i] = sum(a[i, c] * b[i, c]) over `width` columns, and zeros up to whole vectors of rows.
template <class T>
inline void dot_rows(const T* a, int64_t a_stride, const T* b, int64_t b_stride, int64_t rows,
                     int64_t width, float* dots) {
  constexpr int kSide = static_cast<int>(kLanes);
  for (int64_t i = 0; i < rows; i += kLanes) {
    float square[kSide * kSide], turned[kSide * kSide];
    for (int64_t r = 0; r < kLanes; ++r) {
      F lanes{};
      if (i + r < rows)
        for (int64_t c = 0; c < width; c += kLanes)
          lanes += load_lanes(a + (i + r) * a_stride + c, width - c) *
                   load_lanes(b + (i + r) * b_stride + c, width - c);
      store_lanes(square + r * kLanes, lanes);
    }
    at::vec::transpose_mxn<float, kSide, kSide>(square, kLanes, turned, kLanes);
    F sum{};
    for (int64_t lane = 0; lane < kLanes; ++lane) sum += load_lanes(turned + lane * kLanes);
    store_lanes(dots + i, sum);
  }
}

}  // namespace fastdiff::CPU_CAPABILITY
