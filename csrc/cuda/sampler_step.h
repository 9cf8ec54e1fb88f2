// fastdiff::sampler_step on CUDA: one row of a sampler's table (fastdiff/samplers/table.py).
#pragma once

#include <cstdint>

#include "cuda/launch.h"
#include "sampler_table.h"

namespace fastdiff::cuda {

// Every image tensor is dense in one layout, that of x: [N, C, pixels] channels-first or
// [N, pixels, C] channels-last, with C the tensor's own channels, so 2 C in a model's output that
// has variance channels. Pointers must be aligned to an element. The fast path needs pointers and
// images of a multiple of 16 bytes.
//
// The caller copies tensors of other strides. It copies a history whose slots do not have the
// strides of x, and copies it back where depth > 0. `out` may be the same pointer as x, model_out
// (without variance channels) or noise; it must not overlap them otherwise, and the history must
// overlap nothing. Images have fewer than 2^32 elements.
struct SamplerStepArgs {
  Dtype dtype;                       // of x, model_out, noise and out; the rest is float32
  int64_t images, channels, pixels;  // of x
  bool channels_last;
  bool guided;        // model_out is [2 N, ...], the unconditional images first
  bool has_variance;  // model_out is [..., 2 C, ...], v behind m in each image (pixel)

  const void* x;
  const void* model_out;
  const void* noise;    // or null
  const int64_t* seed;  // [N, 2], contiguous, or null; not with noise
  void* out;

  const float* table;  // [rows, kSamplerColumns + depth], of any strides, counted in elements
  int64_t rows, row_stride, column_stride;
  const int64_t* step;  // the row, on the device. Outside 0..rows-1, `out` becomes NaN and no slot
                        // is written

  float* history;       // or null, with depth 0
  int depth;            // 0..8
  int64_t slot_stride;  // elements from a slot to the next

  void* workspace;  // sampler_step_workspace bytes, aligned to 8, uninitialised
};

int64_t sampler_step_workspace(const SamplerStepArgs& args);

// Two launches for any row: sampler_step_image.cu, then sampler_step.cu.
void sampler_step_cuda(const SamplerStepArgs& args, Stream stream);

}  // namespace fastdiff::cuda
