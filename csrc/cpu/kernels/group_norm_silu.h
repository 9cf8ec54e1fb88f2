#pragma once

#include <c10/core/ScalarType.h>

#include <cstdint>

#include "cpu/isa.h"

namespace fastdiff {

// A tensor [N, channels, P], or [N, P, channels] channels-last, whose pixels are then `ld` elements
// apart.
struct NormTensor {
  void* data = nullptr;
  int64_t channels = 0, ld = 0;
};

// All tensors are of one layout. x and skip stand for their concatenation, of C channels. A unit of
// work is `unit_groups` neighbouring groups of one image, or those that are left. "Wide" is float,
// or double for double activations; statistics are double throughout, since a mean rounded to float
// costs accuracy where it is large beside the deviation.
struct GroupNormSilu {
  c10::ScalarType dtype;
  bool channels_last, silu;
  bool wide_parameters = false;  // weight to shift are wide, not of `dtype`
  int64_t channels, pixels, groups, unit_groups;
  double eps;
  NormTensor x, skip;              // read only; skip has no channels where there is none
  const void* weight;              // [C] or null
  const void* bias;                // [C] or null
  const void* add;                 // [N, C] or null
  const void* scale;               // [N, C] or null
  const void* shift;               // [N, C] or null
  const void* residual = nullptr;  // dense, like x, or null
  void* out = nullptr;             // dense, like x
  double* mean = nullptr;          // [N, groups]
  double* rstd = nullptr;          // [N, groups], 1 / sqrt(variance + eps)
};

struct GroupNormSiluBackward {
  GroupNormSilu forward;  // its residual and out are not used; mean and rstd are read
  NormTensor grad;        // of C channels; read only
  NormTensor dx, dskip;   // like x and skip; they may lie where grad does
  void* sum_du;           // [N, C], wide: gradient of the value before SiLU, summed over the pixels
  void* sum_du_h;         // [N, C], wide: the same times the normalised value
  void* sum_dx;           // [N, C], wide, or null: dx summed over the pixels
};

// Units begin..end-1 of N * ceil(groups / unit_groups).
FASTDIFF_DECLARE(group_norm_silu, const GroupNormSilu&, int64_t begin, int64_t end)
FASTDIFF_DECLARE(group_norm_silu_backward, const GroupNormSiluBackward&, int64_t begin, int64_t end)

// dx = grad silu'(x), without a norm, for images begin..end-1.
FASTDIFF_DECLARE(silu_backward, const GroupNormSiluBackward&, int64_t begin, int64_t end)

}  // namespace fastdiff
