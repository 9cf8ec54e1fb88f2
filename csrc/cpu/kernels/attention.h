#pragma once

#include <c10/core/ScalarType.h>

#include <cstdint>

#include "cpu/isa.h"

namespace fastdiff {

// out = softmax(scale q k^T) v of each image and head. q is [B, H, L, D] with the given strides and
// neighbouring D, k and v likewise; out is [B, L, H, D]. T is `dtype`, float32 or bfloat16.
struct Attention {
  c10::ScalarType dtype;
  int64_t batch, heads, queries, keys, width, value_width;
  int64_t q_strides[3], k_strides[3], v_strides[3];  // of B, H and L, in elements
  const void *q, *k, *v;
  void* out;
  float scale;
  float *packed_k, *packed_v;  // attention_packed floats each image and head
};

// A unit of the first is an image's head; of the second also a stretch of queries, innermost.
FASTDIFF_DECLARE(attention_pack, const Attention&, int64_t begin, int64_t end)
FASTDIFF_DECLARE(attention, const Attention&, int64_t begin, int64_t end)

constexpr int64_t kQueries = 48;  // of a unit
constexpr int64_t kWidest = 64;   // what packed rows are rounded up to, of any instruction set

constexpr int64_t attention_packed(int64_t keys, int64_t width) {
  return (keys + kWidest) * (width + kWidest);
}

}  // namespace fastdiff
