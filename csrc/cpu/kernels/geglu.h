#pragma once

#include <c10/core/ScalarType.h>

#include <cstdint>

#include "cpu/isa.h"

namespace fastdiff {

// out = a * gelu(b) of rows x [R, 2D], whose first half is a and whose second half is b.
struct Geglu {
  c10::ScalarType dtype;
  int64_t width;  // D
  const void* x;
  void* out;  // [R, D]
};

// The gradient of x, of which that of `out` is `grad`.
struct GegluBackward {
  c10::ScalarType dtype;
  int64_t width;  // D
  const void *grad, *x;
  void* dx;  // [R, 2D]
};

// Rows begin..end-1.
FASTDIFF_DECLARE(geglu, const Geglu&, int64_t begin, int64_t end)
FASTDIFF_DECLARE(geglu_backward, const GegluBackward&, int64_t begin, int64_t end)

}  // namespace fastdiff
