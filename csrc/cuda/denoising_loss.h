#pragma once

#include <cstdint>

#include "cuda/launch.h"

namespace fastdiff::cuda {

// Dense images of one layout: [N, C, P], or [N, P, C] channels-last.
struct DenoisingLossArgs {
  Dtype dtype;
  bool channels_last;
  int64_t images, channels, pixels;
  const void* prediction;
  const void* x0;       // null: target_x0 counts as 0
  const void* noise;    // null where there is a seed; null without one: target_noise counts as 0
  const int64_t* seed;  // [images, 2], contiguous, of the noise, or null
  const int64_t* row;   // one element, of which the low word counts
  const int64_t* t;     // [images]; outside 0..steps-1 the image's loss and gradient are NaN
  int64_t steps;
  const float* target_x0;  // [steps], as the others
  const float* target_noise;
  const float* weight;
};

// Bytes of `workspace`, aligned to 4; it may be null where they are 0.
int64_t denoising_loss_workspace(const DenoisingLossArgs& args);

// loss [images]. There must be elements.
void denoising_loss_cuda(const DenoisingLossArgs& args, float* loss, void* workspace,
                         Stream stream);

// grad [images]; dprediction like prediction.
void denoising_loss_backward_cuda(const DenoisingLossArgs& args, const float* grad,
                                  void* dprediction, Stream stream);

}  // namespace fastdiff::cuda
