#pragma once

#include <c10/core/ScalarType.h>

#include <cstdint>

#include "cpu/isa.h"

namespace fastdiff {

// out = softmax(scale q k^T) v of each image and head, in float32 or bfloat16. q, k and v are
// [B, H, L, D] with the given strides; the D elements of a row lie side by side. out is [B, L, H,
// D].
struct Attention {
  c10::ScalarType dtype;
  int64_t batch, heads, queries, keys, width, value_width;
  int64_t q_strides[3], k_strides[3], v_strides[3];  // of B, H and L, in elements
  const void *q, *k, *v;
  void* out;
  // [2, B, H, L] or null if it is not wanted: the largest score of each query, times log2(e), and
  // the sum of 2^(score - largest), which together are exacter than the logarithm of the sum.
  float* statistics;
  float scale;
  // For each head of each image attention_packed(...) floats, or attention_bf16_packed(...)
  // bfloat16.
  void *packed_k, *packed_v;
};

// Units begin..end-1. A unit of attention_pack is one head of one image; a unit of attention is
// kQueries queries of one head, or those that are left, heads in order and queries innermost.
FASTDIFF_DECLARE(attention_pack, const Attention&, int64_t begin, int64_t end)
FASTDIFF_DECLARE(attention, const Attention&, int64_t begin, int64_t end)

// The same of bfloat16 tensors by products of bfloat16, with kBf16Queries for kQueries.
FASTDIFF_DECLARE_BF16(attention_bf16_pack, const Attention&, int64_t begin, int64_t end)
FASTDIFF_DECLARE_BF16(attention_bf16, const Attention&, int64_t begin, int64_t end)

constexpr int64_t kQueries = 48;      // of a unit
constexpr int64_t kBf16Queries = 64;  // of a unit: two groups that tiles multiply at a time
constexpr int64_t kWidest = 64;       // at least the lanes of a panel in any instruction set

constexpr int64_t attention_packed(int64_t keys, int64_t width) {
  return (keys + kWidest) * (width + kWidest);
}

// In whole steps of 32 keys by 32 columns.
constexpr int64_t attention_bf16_packed(int64_t keys, int64_t width) {
  return (keys + 31) / 32 * 32 * ((width + 31) / 32 * 32);
}

}  // namespace fastdiff
