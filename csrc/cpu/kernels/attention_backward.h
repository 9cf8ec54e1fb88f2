#pragma once

#include <c10/core/ScalarType.h>

#include <cstdint>

#include "cpu/isa.h"

namespace fastdiff {

// [B, H, rows, columns] with the given strides of B, H and rows, in elements; the columns of a row
// lie side by side.
template <class Pointer>
struct HeadRows {
  Pointer data;
  int64_t strides[3];
};

// The gradients of out = softmax(scale q k^T) v, where that of `out` is `dout`. All are float32 or
// bfloat16, q, k and their gradients [.., width], all else [.., value_width].
struct AttentionBackward {
  c10::ScalarType dtype;
  int64_t batch, heads, queries, keys, width, value_width;
  HeadRows<const void*> dout, q, k, v, out;
  const float* statistics;  // Attention::statistics of the forward
  HeadRows<void*> dq, dk, dv;
  float scale;
  // Each head's blocks of keys are divided into this many shares. If it is more than one, each
  // writes its part of dq, attention_backward_sums(...) floats, to the next place of `sums`.
  int64_t shares;
  float* sums;
};

constexpr int64_t kBackwardQueries = 64;  // of a block
constexpr int64_t kBackwardKeys = 256;    // of a block

constexpr int64_t key_blocks(int64_t keys) { return (keys + kBackwardKeys - 1) / kBackwardKeys; }

constexpr int64_t query_blocks(int64_t queries) {
  return (queries + kBackwardQueries - 1) / kBackwardQueries;
}

// Rows of a block's sums: whole groups of bf16/products.h, which are written whole.
constexpr int64_t attention_backward_width(int64_t width) { return (width + 15) / 16 * 16; }

// A block of queries after the other, each [attention_backward_width(), kBackwardQueries].
constexpr int64_t attention_backward_sums(int64_t queries, int64_t width) {
  return query_blocks(queries) * kBackwardQueries * attention_backward_width(width);
}

// Units begin..end-1. A unit of attention_backward is one share of a head, shares innermost: it
// writes its keys' rows of dk and dv, and dq if there is one share. A unit of attention_backward_dq
// is a block of queries of a head, blocks innermost, whose dq it writes as the sum of the shares.
FASTDIFF_DECLARE(attention_backward, const AttentionBackward&, int64_t begin, int64_t end)
FASTDIFF_DECLARE(attention_backward_dq, const AttentionBackward&, int64_t begin, int64_t end)

// The first of the two for bfloat16 tensors, by products of bfloat16.
FASTDIFF_DECLARE_BF16(attention_backward_bf16, const AttentionBackward&, int64_t begin, int64_t end)

}  // namespace fastdiff
