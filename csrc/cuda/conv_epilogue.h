#pragma once

#include <cstdint>

#include "cuda/launch.h"

namespace fastdiff::cuda {

struct ConvEpilogueArgs {
  Dtype dtype;
  bool channels_last;
  int64_t images, channels, pixels;
  int64_t spans;         // 0: no statistics
  const void* x;         // [N, C, P], or [N, P, C] channels-last
  const void* bias;      // [C] or null
  const void* emb;       // [N, C], contiguous, or null
  const void* residual;  // like x, or null
  void* y;               // like x
  float* statistics;     // [N, spans, 4, C], all of it written; null where spans is 0
};

void conv_epilogue_cuda(const ConvEpilogueArgs& args, Stream stream);

}  // namespace fastdiff::cuda
