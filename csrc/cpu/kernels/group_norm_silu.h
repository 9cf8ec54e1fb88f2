#pragma once

#include <c10/core/ScalarType.h>

#include <cstdint>

#include "cpu/isa.h"

namespace fastdiff {

// Pointers to dense tensors of one layout. A unit of work is `unit_groups` neighbouring groups
// of one image, or those that are left. "Wide" is float, or double for double activations;
// statistics are double throughout, since a mean rounded to float costs accuracy where it is large
// beside the deviation.
struct GroupNormSilu {
  c10::ScalarType dtype;
  bool channels_last, silu;
  int64_t channels, pixels, groups, unit_groups;
  double eps;
  const void* x;                   // [N, C, P], or [N, P, C] channels-last
  const void* weight;              // [C] or null
  const void* bias;                // [C] or null
  const void* add;                 // [N, C] or null
  const void* scale;               // [N, C] or null
  const void* shift;               // [N, C] or null
  const void* residual = nullptr;  // like x, or null
  void* out = nullptr;             // like x
  double* mean = nullptr;          // [N, groups]
  double* rstd = nullptr;          // [N, groups], 1 / sqrt(variance + eps)
};

struct GroupNormSiluBackward {
  GroupNormSilu forward;  // its residual and out are not used; mean and rstd are read
  const void* grad;       // like x
  void* dx;               // like x
  void* sum_du;           // [N, C], wide: gradient of the value before SiLU, summed over the pixels
  void* sum_du_h;         // [N, C], wide: the same times the normalised value
  void* sum_dx;           // [N, C], wide: dx summed over the pixels
};

// Units begin..end-1 of N * ceil(groups / unit_groups).
FASTDIFF_DECLARE(group_norm_silu, const GroupNormSilu&, int64_t begin, int64_t end)
FASTDIFF_DECLARE(group_norm_silu_backward, const GroupNormSiluBackward&, int64_t begin, int64_t end)

}  // namespace fastdiff
