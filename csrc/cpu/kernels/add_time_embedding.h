#pragma once

#include <c10/core/ScalarType.h>

#include <cstdint>

#include "cpu/isa.h"

namespace fastdiff {

struct AddTimeEmbeddingArgs {
  c10::ScalarType dtype;
  bool channels_last;
  int64_t channels, pixels;
  const void* x;    // [N, C, P], or [N, P, C] channels-last
  const void* emb;  // [N, C]
  void* out;
};

// Rows begin..end-1: a row is a channel's pixels, or channels-last a pixel's channels.
FASTDIFF_DECLARE(add_time_embedding, const AddTimeEmbeddingArgs&, int64_t begin, int64_t end)

}  // namespace fastdiff
