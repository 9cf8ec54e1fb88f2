#pragma once

#include <c10/core/ScalarType.h>

#include <cstdint>

#include "cpu/isa.h"
#include "cpu/kernels/image_pieces.h"

namespace fastdiff {

// Pointers to dense tensors of one layout; tables in float, or double for double predictions.
struct DenoisingLossArgs {
  c10::ScalarType dtype;
  Pieces pieces;
  const void* prediction;
  const void* x0;       // null: nothing of it in the target
  const void* noise;    // null: that of the seed or, where there is none, not in the target
  const int64_t* seed;  // null, or (seed, image) of each image
  uint32_t row;
  const int64_t* t;  // [N], checked to lie in the tables
  const void* of_x0;
  const void* of_noise;
  const void* weight;
};

// Squared errors of pieces begin..end-1 of the batch, added up for each in sums[begin..end-1].
FASTDIFF_DECLARE(denoising_loss, const DenoisingLossArgs&, double* sums, int64_t begin, int64_t end)

// The gradient of pieces begin..end-1, for the losses' gradients [N] in the tables' type.
FASTDIFF_DECLARE(denoising_loss_backward, const DenoisingLossArgs&, const void* grad, void* out,
                 int64_t begin, int64_t end)

}  // namespace fastdiff
