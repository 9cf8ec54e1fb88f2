#pragma once

#include <cstdint>

#include "cuda/launch.h"

namespace fastdiff::cuda {

// `height` and `width` are those of the small tensor, in both forward and backward.
struct UpsampleNearest2xArgs {
  Dtype dtype;
  bool channels_last;
  int64_t images, channels, height, width;
  const void* in;  // forward: x [N, C, H, W]; backward: grad [N, C, 2H, 2W]; or [N, H, W, C] ...
  void* out;       // forward: [N, C, 2H, 2W]; backward: [N, C, H, W]; in the layout of `in`
};

void upsample_nearest2x_cuda(const UpsampleNearest2xArgs& args, Stream stream);
void upsample_nearest2x_backward_cuda(const UpsampleNearest2xArgs& args, Stream stream);

}  // namespace fastdiff::cuda
