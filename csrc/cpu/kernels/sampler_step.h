#pragma once

#include <c10/core/ScalarType.h>

#include <cstdint>

#include "cpu/isa.h"

namespace fastdiff {

constexpr int kRow = 10;  // coefficients in a row of the table

struct SamplerStepArgs {
  c10::ScalarType dtype;
  int64_t length;   // elements in a row: all of them, or what is together in x and in model_out
  int64_t stride;   // from one row of model_out to the next
  bool learned;     // model_out[row] is followed by as many variance entries
  const void* row;  // kRow coefficients, float, or double for double images
  const void* x;
  const void* model_out;
  const void* noise;  // or null
  void* out;
};

// Elements begin..end-1 of x.
FASTDIFF_DECLARE(sampler_step, const SamplerStepArgs&, int64_t begin, int64_t end)

}  // namespace fastdiff
