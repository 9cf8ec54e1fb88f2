// y = silu(GroupNorm(cat(x, skip) + add) (1 + scale) + shift) + residual on a GPU.
#pragma once

#include <cstdint>

#include "cuda/launch.h"

namespace fastdiff::cuda {

// Dense tensors of one dtype and one layout: x is [N, C1, P], or [N, P, C1] channels-last, skip has
// C2 channels instead, y and residual have C = C1 + C2. Every pointer is aligned to its element at
// least. Accesses are 128 bits wide where all pointers and runs (P elements; channels-last C1 and
// C2) are multiples of 16 bytes. Null pointers are absent arguments.
struct GroupNormSiluArgs {
  Dtype dtype;
  bool channels_last, silu;
  int64_t images, channels, skip_channels, pixels, groups;  // N, C1, C2 (0 without skip), P, G
  double eps;
  const void* x;
  const void* skip;         // or null
  const void* weight;       // [C] or null
  const void* bias;         // [C] or null
  const void* add;          // [N, C] or null
  const void* scale;        // [N, C] or null
  const void* shift;        // [N, C] or null
  const void* residual;     // like y, or null
  const float* statistics;  // [N, spans, 4, C] (see channel_statistics.cuh) or null; not with skip
  int64_t spans;            // of `statistics`
  void* workspace;          // group_norm_silu_workspace(args) bytes, aligned to 16
  void* y;
  double* mean;  // [N, G], written
  double* rstd;  // [N, G], written: 1 / sqrt(variance + eps)
};

// Bytes of workspace, possibly 0. All other members must be set: the division of the work depends
// on the pointers' alignment and on the shapes.
int64_t group_norm_silu_workspace(const GroupNormSiluArgs& args);

// Writes y, mean and rstd. Does nothing if a tensor has no elements.
void group_norm_silu_cuda(const GroupNormSiluArgs& args, Stream stream);

}  // namespace fastdiff::cuda
