#pragma once

#include <c10/core/ScalarType.h>

#include <cstdint>

#include "cpu/isa.h"
#include "cpu/kernels/image_pieces.h"

namespace fastdiff {

// Pointers to dense tensors of one layout; coefficients in float, or double for double images.
struct QSampleArgs {
  c10::ScalarType dtype;
  int64_t image;  // elements in an image
  const void* x0;
  const void* noise;
  void* out;
  const int64_t* t;  // [N], checked to lie in the tables
  const void* signal;
  const void* sigma;
};

// Elements begin..end-1 of the batch.
FASTDIFF_DECLARE(q_sample, const QSampleArgs&, int64_t begin, int64_t end)

// Likewise, with the noise of a seed.
struct QSampleFromSeedArgs {
  c10::ScalarType dtype;
  Pieces pieces;
  const void* x0;
  void* out;
  const int64_t* seed;  // (seed, image) of each image
  uint32_t row;
  const int64_t* t;  // [N], checked to lie in the tables
  const void* signal;
  const void* sigma;
};

// Pieces begin..end-1 of the batch.
FASTDIFF_DECLARE(q_sample_from_seed, const QSampleFromSeedArgs&, int64_t begin, int64_t end)

}  // namespace fastdiff
