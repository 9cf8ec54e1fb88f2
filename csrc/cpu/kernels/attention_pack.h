// The products of attention in float32: how rows become B, and how deep sums are taken.
#pragma once

#include "cpu/kernels/gemm.h"

namespace fastdiff::CPU_CAPABILITY {

// From rows that lie `stride` elements apart, in panels of panel_columns(): rows *
// packed_columns(width) floats. Returns the end of what it has written.
template <class T>
inline float* pack_panels(const T* from, int64_t stride, int64_t rows, int64_t width, float* to) {
  for (int64_t first = 0, columns; first < width; first += columns) {
    columns = panel_columns(width - first);
    for (int64_t i = 0; i < rows; ++i) {
      __builtin_prefetch(from + (i + 8) * stride + first);
      for (int64_t c = 0; c < packed_columns(columns); c += kLanes, to += kLanes)
        store_lanes(to, load_lanes(from + i * stride + first + c, columns - c));
    }
  }
  return to;
}

// As multiply_panel(), in pieces of the depth, whose sums round less than one chain of all products
// would. Forward and backward take scores by this, so that theirs are the same bits: the softmax of
// a score that towers is then exact in the backward too.
inline void multiply_in_pieces(int64_t m, const float* const* rows, int64_t depth, const float* b,
                               int64_t columns, bool prefetch, Into out) {
  constexpr int64_t kPiece = 128;
  int64_t k = 0;
  do {
    const int64_t piece = std::min(kPiece, depth - k);
    const float* const next = b + piece * packed_columns(columns);
    multiply_panel(m, rows, k, piece, b, columns, {prefetch ? next : nullptr}, out);
    out.accumulate = true;
    b = next, k += piece;
  } while (k < depth);
}

}  // namespace fastdiff::CPU_CAPABILITY
