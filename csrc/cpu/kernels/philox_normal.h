#pragma once

#include <c10/core/ScalarType.h>

#include <cstdint>

#include "cpu/isa.h"

namespace fastdiff {

struct PhiloxNormalArgs {
  c10::ScalarType dtype;
  int64_t image;        // elements in an image
  int64_t pieces;       // pieces of kPhiloxPiece elements in an image, the last one shorter
  const int64_t* seed;  // (seed, image) of each image
  uint32_t row;
  void* out;
};

constexpr int64_t kPhiloxPiece = 1024;

// Pieces begin..end-1 of the batch.
FASTDIFF_DECLARE(philox_normal, const PhiloxNormalArgs&, int64_t begin, int64_t end)

}  // namespace fastdiff
