// Gradients of group_norm_silu on a GPU.
#pragma once

#include <cstdint>

#include "cuda/launch.h"

namespace fastdiff::cuda {

// Layout, alignment and absent arguments are as in GroupNormSiluArgs.
struct GroupNormSiluBackwardArgs {
  Dtype dtype;
  bool channels_last, silu;
  int64_t images, channels, skip_channels, pixels, groups;  // N, C1, C2 (0 without skip), P, G
  const void* grad;                                         // [N, C, P], or [N, P, C] channels-last
  const void* x;                                            // with C1 channels
  const void* skip;                                         // with C2 channels, or null
  const double* mean;                                       // [N, G], of the forward
  const double* rstd;                                       // [N, G]
  const void* weight;                                       // [C] or null
  const void* bias;                                         // [C] or null
  const void* add;                                          // [N, C] or null
  const void* scale;                                        // [N, C] or null
  const void* shift;                                        // [N, C] or null
  void* workspace;  // group_norm_silu_backward_workspace(args) bytes, aligned to 16
  void* dx;         // like x
  void* dskip;      // like skip; null without it
  void* dweight;    // [C]; these five are always written
  void* dbias;      // [C]
  void* dadd;       // [N, C]
  void* dscale;     // [N, C]
  void* dshift;     // [N, C]
};

// Bytes of workspace. All other members must be set.
int64_t group_norm_silu_backward_workspace(const GroupNormSiluBackwardArgs& args);

// Writes dx, dskip, dweight, dbias, dadd, dscale and dshift. Does nothing if grad has no elements:
// then the caller must set dweight and dbias to zero.
void group_norm_silu_backward_cuda(const GroupNormSiluBackwardArgs& args, Stream stream);

}  // namespace fastdiff::cuda
