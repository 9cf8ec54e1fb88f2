// From pixels to the planes of Winograd's method: what the convolution does with its input, and the
// gradient of its weight with its input and with dy.
#pragma once

#include "cpu/kernels/conv2d_grid.h"
#include "cpu/kernels/conv2d_patch.h"
#include "cpu/kernels/conv2d_winograd_matrices.h"

namespace fastdiff::CPU_CAPABILITY {

template <class Element>
constexpr int64_t kLineOf = kLine * sizeof(float) / sizeof(Element);  // elements of a cache line

// The distance of planes of that many elements: an odd number of cache lines, so that a line of
// each goes to a set of the cache of its own. Were they multiples of 16 lines apart, as tiles and
// channels would have it, 9 of 36 would share each set of 8.
template <class Element>
constexpr int64_t odd_lines(int64_t count) {
  constexpr int64_t line = kLineOf<Element>;
  return (rounded_up(count, line) / line | 1) * line;
}

// Planes [kTile^2, tiles, channels]. Tiles are `ld` elements apart, planes `plane`.
template <class Element>
struct Planes {
  Element* first;
  int64_t ld, plane;
};

// The two transforms of a side of a tile: of m + r - 1 pixels of the input, by B^T, and of m pixels
// of dy, by A.
template <int m, int r>
struct OfInput {
  static constexpr int kStep = m, kPixels = m + r - 1, kTile = m + r - 1;

  static FASTDIFF_INLINE void transform(const F* d, int64_t step, F* out, int64_t out_step) {
    Filtering<m, r>::input(d, step, out, out_step);
  }
};

template <int m, int r>
struct OfGradient {
  static constexpr int kStep = m, kPixels = m, kTile = m + r - 1;

  static FASTDIFF_INLINE void transform(const F* d, int64_t step, F* out, int64_t out_step) {
    Filtering<m, r>::gradient(d, step, out, out_step);
  }
};

// Some channels of a segment's pixels, in a patch [rows, columns, kChannels].
template <class Of, int64_t kChannels>
struct TilePatch {
  static constexpr int64_t kRow = 8;  // tiles that are transformed together

  const int64_t down, across;  // tiles
  const int64_t rows, columns;

  explicit TilePatch(const Segment& segment)
      : down(segment.bottom - segment.top),
        across(segment.width()),
        rows(down * Of::kStep + Of::kPixels - Of::kStep),
        columns(across * Of::kStep + Of::kPixels - Of::kStep) {}

  int64_t size() const { return rows * columns * kChannels; }

  // Reads channels begin..end of an image from pixel (row, column) on, and zeros up to `deep`
  // channels.
  template <class T>
  void read(const Conv2d& p, int64_t image, int64_t row, int64_t column, int64_t begin, int64_t end,
            int64_t deep, float* patch) const {
    read_patch<T>(p, image, row, column, rows, columns, begin, end, patch, kChannels);
    if (end - begin < deep)
      for (int64_t i = 0; i < rows * columns; ++i)
        for (int64_t c = end - begin; c < deep; ++c) patch[i * kChannels + c] = 0;
  }

  // Transforms `deep` channels of all tiles; those of the first tile go to planes.first.
  template <class Element>
  void transform(const float* patch, int64_t deep, const Planes<Element> planes) const {
    for (int64_t i = 0; i < down; ++i)
      for (int64_t j = 0; j < across; j += kRow) {
        const float* from = patch + (i * columns + j) * Of::kStep * kChannels;
        Element* to = planes.first + (i * across + j) * planes.ld;
        for (int64_t c = 0; c < deep; c += kLanes)
          transform_row(from + c, std::min(kRow, across - j), to + c, planes);
      }
  }

 private:
  // `tiles` neighbours in a row, at most kRow: first down each column of pixels, of which
  // neighbours share some, then across.
  template <class Element>
  FASTDIFF_INLINE void transform_row(const float* from, int64_t tiles, Element* to,
                                     const Planes<Element> planes) const {
    constexpr int kTile = Of::kTile, kPixels = Of::kPixels, kStep = Of::kStep;
    constexpr int64_t kMost = kRow * kStep + kPixels - kStep;
    F down_columns[kTile][kMost];
    for (int64_t j = 0; j < tiles * kStep + kPixels - kStep; ++j) {
      F d[kPixels];
#pragma GCC unroll 6
      for (int a = 0; a < kPixels; ++a) d[a] = load_lanes(from + (a * columns + j) * kChannels);
      Of::transform(d, 1, &down_columns[0][j], kMost);
    }
    for (int64_t t = 0; t < tiles; ++t, to += planes.ld) {
#pragma GCC unroll 6
      for (int a = 0; a < kTile; ++a) {
        F out[kTile];
        Of::transform(&down_columns[a][t * kStep], 1, out, 1);
#pragma GCC unroll 6
        for (int q = 0; q < kTile; ++q) store_lanes(to + (a * kTile + q) * planes.plane, out[q]);
      }
    }
  }
};

}  // namespace fastdiff::CPU_CAPABILITY
