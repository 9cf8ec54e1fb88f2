// out = softmax(scale q k^T) v of bfloat16 without the matrix of scores (Dao et al. 2022,
// arXiv:2205.14135), by products of bfloat16. A few queries at a time go over a block of keys.
// Their scores are products summed up in float32, and so is the softmax; its numerators are rounded
// to bfloat16 for their product with the values. Each query keeps the largest score, the sum of
// numerators and the weighted sum of values so far, and is divided and rounded once at the end.
//
// Keys and values are packed once for all queries, as products.h wants its B, with zeros up to
// whole steps of 32. Keys past the last one repeat it instead, so that they change no maximum:
// their values are zero, and the sum leaves them out.
//
// q, k and v are read once and out is written once, which is the least; a head's packed keys and
// values, 2 bytes a number, are written once and read for every kBf16Queries queries, from L2 where
// they fit it. The time goes into the products and the exponentials: so a score becomes an exponent
// by one multiply-add, the polynomial is as short as bfloat16 lets it be, and nothing is masked.
#include "cpu/kernels/attention.h"

#include <cmath>
#include <limits>

#include "cpu/kernels/activations.h"
#include "cpu/kernels/bf16/attention_pack.h"
#include "cpu/kernels/memory.h"

namespace fastdiff::CPU_CAPABILITY {
namespace {

constexpr int64_t kKeys = 256;  // of a block
constexpr float kNone = -std::numeric_limits<float>::infinity();
// Queries whose scores with a block are kept: as many as are multiplied together, or as stay in an
// L1 of 32 KiB.
#ifdef FASTDIFF_TILES
constexpr int64_t kBand = kTogetherRows;
#else
constexpr int64_t kBand = 16;
#endif
// Floats from a query's scores to the next one's, and numbers from its numerators to the next
// one's. Rows that lie a power of two apart would share a few sets of the cache.
constexpr int64_t kScoresLd = kKeys + kLine, kProbsLd = kKeys + kColumns;

using Probs = Values<bf16>;
using V = Probs::V;

// What a query has seen so far.
struct Seen {
  float top = kNone;  // its largest score
  V sum{};            // of 2^(score - top), for each lane
};

// The largest of `count` scores, which are whole vectors.
FASTDIFF_INLINE float largest(const float* scores, int64_t count) {
  Probs found = Probs::load_wide(scores);
  for (int64_t j = Probs::size; j < count; j += Probs::size)
    found = Probs::each([](const V& x, const V& y) FASTDIFF_HOT { return at_least(x, y); },
                        Probs::load_wide(scores + j), found);
  V most = found.vector[0];
  for (int i = 1; i < Probs::vectors; ++i) most = at_least(found.vector[i], most);
  using At = at::vec::Vectorized<float>;
  return at::vec::vec_reduce_all<float>(
      [](const At& a, const At& b) { return at::vec::clamp_min(a, b); }, to_torch(most));
}

// A query's scores with a block of `count` keys, which are whole steps, become its `probs`,
// 2^(factor * score - top). The last step's are counted in the sum as often as `counted` says.
// Returns what the query's sums so far are to be multiplied by.
FASTDIFF_INLINE float softmax(const float* scores, int64_t count, float factor,
                              const float* counted, bf16* probs, Seen& seen) {
  const float now = std::max(seen.top, largest(scores, count) * factor);
  const float shrink = now == seen.top ? 1.f : exp2_by_floor<5>(fill_lanes<V>(seen.top - now))[0];
  // If all scores so far are -inf, subtracting their maximum would give NaN.
  const Probs by(factor), minus(now == kNone ? 0.f : -now);
  const auto take = [&](int64_t j) FASTDIFF_HOT {
    const Probs values = exp2_values(fmadd(Probs::load_wide(scores + j), by, minus));
    values.store(probs + j);
    return values;
  };
  Probs sum{V{}};
  const int64_t last = count - kColumns;
  for (int64_t j = 0; j < last; j += Probs::size) sum = sum + take(j);
  for (int64_t j = 0; j < kColumns; j += Probs::size)
    sum = fmadd(take(last + j), Probs::load_wide(counted + j), sum);
  V each = seen.sum * shrink;
  for (const V& lanes : sum.vector) each += lanes;
  seen = {now, each};
  return shrink;
}

void multiply_row(float* row, int64_t count, float by) {
  for (int64_t c = 0; c < count; c += lanes_of<V>)
    store_lanes(row + c, load_lanes<V>(row + c) * by);
}

// The queries of a unit, of whole steps. A negative scale becomes their sign, so that the largest
// product has the largest score.
void load_queries(const Attention& p, const bf16* q, int64_t count, bf16* to) {
  for (int64_t i = 0; i < count; ++i)
    for (int64_t d = 0; d < p.width; d += kColumns, to += kColumns) {
      load_line(q + i * p.q_strides[2] + d, p.width - d, to);
      if (p.scale < 0)
        for (int64_t j = 0; j < kColumns; ++j) to[j].x ^= 0x8000;
    }
}

void store_outputs(const Attention& p, const float* from, int64_t ld, const Seen* seen,
                   int64_t count, bf16* out, float* statistics) {
  for (int64_t i = 0; i < count; ++i) {
    // Where all scores are -inf PyTorch has NaN.
    const float sum =
        seen[i].top == kNone ? std::numeric_limits<float>::quiet_NaN() : sum_lanes(seen[i].sum);
    if (statistics) {
      statistics[i] = seen[i].top;
      statistics[p.batch * p.heads * p.queries + i] = sum;
    }
    const Probs by(1.f / sum);
    for_values<bf16>(p.value_width, [&](int64_t c, int64_t n) FASTDIFF_HOT {
      (Probs::load_wide(from + i * ld + c) * by).store(out + i * p.heads * p.value_width + c, n);
    });
  }
}

void attend(const Attention& p, int64_t unit, int64_t begin) {
  static thread_local Scratch scratch;
  const int64_t image = unit / p.heads, head = unit % p.heads;
  const int64_t count = std::min(kBf16Queries, p.queries - begin);
  const int64_t depth = whole(p.width), out_ld = whole(p.value_width) + kLine;
  float* const scores =
      scratch.at_least(kBand * (kScoresLd + kProbsLd / 2) + kBf16Queries * (out_ld + depth / 2));
  float* const out = scores + kBand * kScoresLd;
  bf16* const probs = reinterpret_cast<bf16*>(out + kBf16Queries * out_ld);
  bf16* const queries = probs + kBand * kProbsLd;
  load_queries(p,
               static_cast<const bf16*>(p.q) + image * p.q_strides[0] + head * p.q_strides[1] +
                   begin * p.q_strides[2],
               count, queries);
  const float factor = std::abs(p.scale) * static_cast<float>(kLog2e);  // softmax of powers of 2
  const auto* keys =
      static_cast<const bf16*>(p.packed_k) + unit * attention_bf16_packed(p.keys, p.width);
  const auto* values =
      static_cast<const bf16*>(p.packed_v) + unit * attention_bf16_packed(p.keys, p.value_width);
  Seen seen[kBf16Queries];
  for (int64_t k0 = 0; k0 < p.keys; k0 += kKeys) {
    const int64_t left = p.keys - k0, block = std::min(kKeys, whole(left));
    float counted[kColumns];  // of the last step of keys: 1, or 0 past the last key
    for (int64_t j = 0; j < kColumns; ++j) counted[j] = block - kColumns + j < left ? 1.f : 0.f;
    for (int64_t i = 0; i < count; i += kBand) {
      const int64_t band = std::min(kBand, count - i);
      for (int64_t k = 0; k < block; k += kColumns)
        multiply_rows(queries + i * depth, depth, band, p.width, keys + (k0 + k) * depth, kColumns,
                      scores + k, kScoresLd, false);
      for (int64_t r = 0; r < band; ++r) {
        const float shrink = softmax(scores + r * kScoresLd, block, factor, counted,
                                     probs + r * kProbsLd, seen[i + r]);
        if (k0 > 0 && shrink != 1.f)
          multiply_row(out + (i + r) * out_ld, whole(p.value_width), shrink);
      }
      for (int64_t c = 0; c < p.value_width; c += kColumns)
        multiply_rows(probs, kProbsLd, band, std::min(block, left),
                      values + c * whole(p.keys) + k0 * kColumns, p.value_width - c,
                      out + i * out_ld + c, out_ld, k0 > 0);
    }
  }
  store_outputs(
      p, out, out_ld, seen, count,
      static_cast<bf16*>(p.out) + ((image * p.queries + begin) * p.heads + head) * p.value_width,
      p.statistics ? p.statistics + unit * p.queries + begin : nullptr);
}

}  // namespace

void attention_bf16_pack(const Attention& p, int64_t begin, int64_t end) {
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t image = unit / p.heads, head = unit % p.heads;
    const auto of_head = [&](const void* x, const int64_t* strides) {
      return static_cast<const bf16*>(x) + image * strides[0] + head * strides[1];
    };
    pack_turned(of_head(p.k, p.k_strides), p.k_strides[2], p.keys, p.width,
                static_cast<bf16*>(p.packed_k) + unit * attention_bf16_packed(p.keys, p.width));
    pack_panels(
        of_head(p.v, p.v_strides), p.v_strides[2], p.keys, p.value_width,
        static_cast<bf16*>(p.packed_v) + unit * attention_bf16_packed(p.keys, p.value_width));
  }
}

void attention_bf16(const Attention& p, int64_t begin, int64_t end) {
  const Tiles tiles;
  const int64_t each = (p.queries + kBf16Queries - 1) / kBf16Queries;  // units of an image's head
  for (int64_t unit = begin; unit < end; ++unit) attend(p, unit / each, unit % each * kBf16Queries);
}

}  // namespace fastdiff::CPU_CAPABILITY
