#pragma once

#include <cstdint>

#include "cuda/launch.h"

namespace fastdiff::cuda {

struct AddTimeEmbeddingArgs {
  Dtype dtype;
  bool channels_last;
  int64_t images, channels, pixels;
  const void* x;    // [N, C, P], or [N, P, C] channels-last
  const void* emb;  // [N, C], contiguous
  void* out;        // like x
};

void add_time_embedding_cuda(const AddTimeEmbeddingArgs& args, Stream stream);

}  // namespace fastdiff::cuda
