#pragma once

#include <cstdint>

#include "cuda/launch.h"

namespace fastdiff::cuda {

// Pointers to dense tensors of the same memory layout, which are walked flat.
struct QSampleArgs {
  Dtype dtype;
  int64_t images;
  int64_t image;  // elements in an image
  const void* x0;
  const void* noise;
  void* out;
  const int64_t* t;  // [images]; an image whose timestep is not in 0..steps-1 becomes NaN
  int64_t steps;
  const float* signal;  // [steps], sqrt(abar)
  const float* sigma;   // [steps], sqrt(1 - abar)
};

void q_sample_cuda(const QSampleArgs& args, Stream stream);

struct QSampleFromSeedArgs {
  Dtype dtype;
  bool channels_last;
  int64_t images, channels, pixels;
  const void* x0;  // [N, C, P], or [N, P, C] channels-last
  void* out;       // like x0
  const int64_t* t;
  int64_t steps;
  const float* signal;
  const float* sigma;
  const int64_t* seed;  // [images, 2], contiguous
  const int64_t* row;   // one element; its low 32 bits count
};

void q_sample_from_seed_cuda(const QSampleFromSeedArgs& args, Stream stream);

}  // namespace fastdiff::cuda
