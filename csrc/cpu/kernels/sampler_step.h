#pragma once

#include <c10/core/ScalarType.h>

#include <cstdint>

#include "cpu/isa.h"
#include "sampler_table.h"

namespace fastdiff {

// Dense tensors of one layout. "Wide" is float, or double for double images.
struct SamplerStepArgs {
  c10::ScalarType dtype;
  const double* row;  // kSamplerColumns coefficients, each exact in the wide type

  int64_t total;      // elements of x
  int64_t length;     // elements walked together: an image's, or all where no image is special
  int64_t channels;   // where interleaved
  bool guided;        // model_out has `total` more entries, the conditional ones
  bool learned;       // the variance channels are there and wanted
  bool has_variance;  // the variance channels are there: `length` is an image's
  bool interleaved;   // they follow each pixel's channels (channels-last), not the image's

  const void* x;
  const void* model_out;
  const void* noise;       // or null
  const void* wide_noise;  // or null: noise in the wide type
  const int64_t* seed;     // or null: (seed, image) of each image, which then is in channels-first
  uint32_t step;           // for the noise

  int reads;                        // slots of the history that are read,
  const void* read[kSamplerDepth];  // each in the wide type,
  double factor[kSamplerDepth];     // and its coefficient
  void* keep;                       // the slot that is written, or null

  const double* rescale;  // factors on m, one an image, or null
  const double* limit;    // limits of dynamic thresholding, one an image, or null
  void* out;
};

// Elements begin..end-1 of x.
FASTDIFF_DECLARE(sampler_step, const SamplerStepArgs&, int64_t begin, int64_t end)

// The factor on an image's m by which guidance is rescaled.
FASTDIFF_DECLARE(sampler_step_rescale, const SamplerStepArgs&, int64_t image, double* factor)

// |x0| of one image, in the wide type, before anything is clipped.
FASTDIFF_DECLARE(sampler_step_magnitudes, const SamplerStepArgs&, int64_t image, void* out)

}  // namespace fastdiff
