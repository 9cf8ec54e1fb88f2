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
  const void* noise;    // null with a seed; null without a seed: target_noise counts as 0
  const int64_t* seed;  // [images, 2], contiguous: seeds of the noise; or null
  const int64_t* row;   // one element; its low 32 bits count
  const int64_t* t;     // [images]; outside 0..steps-1 the image's loss and gradient are NaN
  int64_t steps;
  const float* target_x0;  // [steps], like target_noise and weight
  const float* target_noise;
  const float* weight;
};

// Bytes of `workspace`, which is aligned to 4 and may be null where they are 0.
int64_t denoising_loss_workspace(const DenoisingLossArgs& args);

// Writes loss [images]. The images must have elements.
void denoising_loss_cuda(const DenoisingLossArgs& args, float* loss, void* workspace,
                         Stream stream);

// Writes dprediction, which is like prediction, from grad [images].
void denoising_loss_backward_cuda(const DenoisingLossArgs& args, const float* grad,
                                  void* dprediction, Stream stream);

}  // namespace fastdiff::cuda
