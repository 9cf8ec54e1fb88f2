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
  int64_t length;     // elements of an image, or of all images where none needs its own treatment
  int64_t channels;   // of x; used only where interleaved
  bool guided;        // model_out has twice the images: the second half is the conditional one
  bool learned;       // model_out has variance channels, and this row uses them
  bool has_variance;  // model_out has variance channels, so `length` is an image's
  bool interleaved;   // variance channels follow each pixel's channels (channels-last), not each
                      // image

  const void* x;
  const void* model_out;
  const void* noise;       // or null
  const void* wide_noise;  // or null: noise in the wide type
  const int64_t* seed;     // or null: (seed, image) of each image; x is then channels-first
  uint32_t step;           // the row of noise that a seed gives

  int reads;                        // how many slots of the history are read
  const void* read[kSamplerDepth];  // those slots, in the wide type
  double factor[kSamplerDepth];     // their coefficients
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
