// What attention_backward.cpp and bf16/attention_backward.cpp share: where a head's rows are, the
// shares of its keys, and how sums become rows of a gradient.
#pragma once

#include "cpu/kernels/attention_backward.h"
#include "cpu/kernels/attention_rows.h"
#include "cpu/kernels/memory.h"

namespace fastdiff::CPU_CAPABILITY {

template <class T, class Pointer>
FASTDIFF_INLINE T* head_of(const HeadRows<Pointer>& x, int64_t image, int64_t head) {
  return static_cast<T*>(x.data) + image * x.strides[0] + head * x.strides[1];
}

// The share of a head that a unit is: its keys, in whole blocks but for the last, and the sums of
// its part of dq for each block of queries, [width, kBackwardQueries].
class Share {
 public:
  Share(const AttentionBackward& p, int64_t unit)
      : image(unit / p.shares / p.heads),
        head(unit / p.shares % p.heads),
        width_(attention_backward_width(p.width)) {
    const int64_t blocks = key_blocks(p.keys), share = unit % p.shares;
    begin = blocks * share / p.shares * kBackwardKeys;
    end = std::min(p.keys, blocks * (share + 1) / p.shares * kBackwardKeys);
    finishes = p.shares == 1;
    once_ = finishes && blocks == 1;  // then a block's sums are stored as soon as they are there
    const int64_t queries = once_ ? kBackwardQueries : p.queries;
    const int64_t floats = attention_backward_sums(queries, p.width);
    if (finishes) own_.reserve(floats);
    sums_ = finishes ? own_.data() : p.sums + unit * floats;
  }

  float* sums(int64_t first_query) { return sums_ + (once_ ? 0 : first_query * width_); }

  const int64_t image, head;
  int64_t begin, end;  // its keys
  bool finishes;       // whether its sums are those of all keys, and dq is to be stored

 private:
  const int64_t width_;
  bool once_;
  float* sums_;
  Array<float> own_;
};

// What P and dS have of each query of a block: P = 2^(score - largest) * inverse, and
// dS = P * (dP - delta). Beyond the queries, up to whole vectors, all is zero.
struct QueryStatistics {
  float largest[kBackwardQueries], inverse[kBackwardQueries], delta[kBackwardQueries];

  template <class T>
  void load(const AttentionBackward& p, const Share& share, int64_t first, int64_t count) {
    const auto rows = [&](const HeadRows<const void*>& x) {
      return head_of<const T>(x, share.image, share.head) + first * x.strides[2];
    };
    dot_rows(rows(p.out), p.out.strides[2], rows(p.dout), p.dout.strides[2], count, p.value_width,
             delta);
    const float* from = p.statistics + (share.image * p.heads + share.head) * p.queries + first;
    const float* sums = from + p.batch * p.heads * p.queries;
    for (int64_t i = 0; i < kBackwardQueries; ++i) {
      largest[i] = i < count ? from[i] : 0.f;
      inverse[i] = i < count ? 1.f / sums[i] : 0.f;
    }
  }
};

// `rows` of a block's queries of dq from their sums; `scratch` has as many rows of whole vectors.
template <class T>
inline void store_dq(const float* sums, int64_t rows, int64_t width, float factor, float* scratch,
                     T* to, int64_t stride) {
  const int64_t ld = rounded_up(width, kLanes);
  transpose_rows(sums, kBackwardQueries, width, rows, 1.f, scratch, ld);
  copy_rows(scratch, ld, rows, width, factor, to, stride);
}

}  // namespace fastdiff::CPU_CAPABILITY
