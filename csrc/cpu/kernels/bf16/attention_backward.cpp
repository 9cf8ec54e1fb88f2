// The gradients of attention on bfloat16 tensors by products of bfloat16: the method of
// ../attention_backward.cpp. Scores, dP and all sums are float32, the softmax's weights P and the
// gradients dS of the scores are rounded to bfloat16 for the three products that they are in.
//
// A band of keys at a time computes its scores and its rows of dP^T, turns them into rows of P^T
// and dS^T while they are in L1, and adds their products to its rows of dv and dk. The rows of dS^T
// are also kept in pairs, as products.h wants its B, for the product with the whole block for dq.
#include "cpu/kernels/attention_backward.h"

#include <utility>

#include "cpu/kernels/activations.h"
#include "cpu/kernels/attention_backward_heads.h"
#include "cpu/kernels/bf16/attention_pack.h"

namespace fastdiff::CPU_CAPABILITY {
namespace {

constexpr int64_t kKeys = kBackwardKeys, kQueries = kBackwardQueries;
constexpr int64_t kBand = kTogetherRows;  // keys whose scores are kept
// Rows that lie a power of two apart would share a few sets of the cache.
constexpr int64_t kScoresLd = kQueries + kLine, kWeightsLd = kQueries + kColumns;

// A block of queries as operands of the products, in whole steps.
struct Queries {
  int64_t count;
  bf16 *turned_q, *turned_dout;  // B of the scores and of dP^T
  bf16 *q, *dout;                // B of dk and dv
  QueryStatistics of;

  void load(const AttentionBackward& p, const Share& share, int64_t first) {
    count = std::min(kQueries, p.queries - first);
    const auto pack = [&](const HeadRows<const void*>& x, int64_t width, bf16* turned,
                          bf16* panels) {
      const bf16* rows = head_of<const bf16>(x, share.image, share.head) + first * x.strides[2];
      pack_turned(rows, x.strides[2], count, width, turned);
      pack_panels(rows, x.strides[2], count, width, panels);
    };
    pack(p.q, p.width, turned_q, q);
    pack(p.dout, p.value_width, turned_dout, dout);
    of.load<bf16>(p, share, first, count);
  }
};

// A block of keys: operands, the sums of its gradients, and its products with a block of queries.
struct Keys {
  int64_t count, steps;        // keys, and their steps
  int64_t depth, value_depth;  // widths in whole steps
  bf16 *k, *v, *turned_k;      // A of the scores, of dP^T and of dq
  float *dk, *dv;              // rows of whole steps and a cache line
  float *scores, *above;       // of a band, and its rows of dP^T
  bf16 *weights, *gradients;   // of a band, P^T and dS^T
  bf16* pairs;                 // dS^T as B of dq

  void load(const AttentionBackward& p, const Share& share, int64_t first) {
    count = std::min(kKeys, share.end - first);
    steps = whole(count) / kColumns;
    const auto copy = [&](const HeadRows<const void*>& x, int64_t width, bf16* to) {
      const bf16* rows = head_of<const bf16>(x, share.image, share.head) + first * x.strides[2];
      for (int64_t j = 0; j < steps * kColumns; ++j)
        for (int64_t d = 0; d < width; d += kColumns, to += kColumns)
          load_line(rows + j * x.strides[2] + d, j < count ? width - d : 0, to);
    };
    copy(p.k, p.width, k);
    copy(p.v, p.value_width, v);
    for (int64_t j = 0; j < steps * kColumns; j += 16)
      for (int64_t d = 0; d < depth; d += 16)
        at::vec::transpose_mxn<bf16, 16, 16>(k + j * depth + d, depth,
                                             turned_k + d * turned_ld() + j, turned_ld());
  }

  static constexpr int64_t turned_ld() { return kKeys + kColumns; }
  int64_t dk_ld() const { return depth + kLine; }
  int64_t dv_ld() const { return value_depth + kLine; }

  // All products of a band, the keys from `first` on, but that for dq. `accumulate` is false for
  // the first queries.
  void multiply(const AttentionBackward& p, const Queries& queries, int64_t first,
                bool accumulate) {
    const int64_t band = std::min(kBand, count - first);
    for (int64_t c = 0; c < queries.count; c += kColumns) {
      multiply_rows(k + first * depth, depth, band, p.width, queries.turned_q + c * depth,
                    queries.count - c, scores + c, kScoresLd, false);
      multiply_rows(v + first * value_depth, value_depth, band, p.value_width,
                    queries.turned_dout + c * value_depth, queries.count - c, above + c, kScoresLd,
                    false);
    }
    const float factor = p.scale * static_cast<float>(kLog2e);
    for (int64_t j = 0; j < kBand; j += 2)
      weigh(queries, factor, j, band, pairs + first * kColumns + j * 16);
    for (int64_t c = 0; c < p.value_width; c += kColumns)
      multiply_rows(weights, kWeightsLd, band, queries.count,
                    queries.dout + c * whole(queries.count), p.value_width - c,
                    dv + first * dv_ld() + c, dv_ld(), accumulate);
    for (int64_t c = 0; c < p.width; c += kColumns)
      multiply_rows(gradients, kWeightsLd, band, queries.count,
                    queries.q + c * whole(queries.count), p.width - c, dk + first * dk_ld() + c,
                    dk_ld(), accumulate);
  }

  // Two keys of a band: their scores become weights, and their rows of dP^T those of dS^T. What
  // lies beyond the keys or the queries becomes zero, since it may be no number.
  void weigh(const Queries& queries, float factor, int64_t j, int64_t band, bf16* to) {
    for (int64_t c = 0; c < queries.count; c += kColumns, to += steps * kStepValues)
      for (int64_t half = c; half < c + kColumns; half += kLanes) {
        for (int64_t r = j; r < j + 2; ++r) {
          F weight{}, gradient{};
          if (r < band && half < queries.count) {
            const F power = fmadd(load_lanes(scores + r * kScoresLd + half), fill_lanes<F>(factor),
                                  -load_lanes(queries.of.largest + half));
            weight = exp2_by_floor<3>(power) * load_lanes(queries.of.inverse + half);
            gradient = weight * (load_lanes(above + r * kScoresLd + half) -
                                 load_lanes(queries.of.delta + half));
            for (int64_t i = queries.count - half; i < kLanes; ++i) weight[i] = gradient[i] = 0;
          }
          store_lanes(weights + r * kWeightsLd + half, weight);
          store_lanes(gradients + r * kWeightsLd + half, gradient);
        }
        const bf16* both = gradients + j * kWeightsLd + half;
        pack_pairs(both, both + kWeightsLd, to + (half - c) / 16 * (kStepValues / 2));
      }
  }

  void add_dq(const AttentionBackward& p, const Queries& queries, float* sums, bool accumulate) {
    for (int64_t d = 0; d < p.width; d += kTogetherRows)
      for (int64_t c = 0; c < queries.count; c += kColumns)
        multiply_rows(turned_k + d * turned_ld(), turned_ld(), std::min(kTogetherRows, p.width - d),
                      count, pairs + c * steps * kColumns, queries.count - c,
                      sums + d * kQueries + c, kQueries, accumulate);
  }
};

void differentiate(const AttentionBackward& p, int64_t unit) {
  static thread_local Scratch scratch;
  Share share(p, unit);
  const int64_t most = whole(std::min(kKeys, p.keys));
  Keys keys{.depth = whole(p.width), .value_depth = whole(p.value_width)};
  const int64_t rows = keys.depth + keys.value_depth;
  float* free =
      scratch.at_least(most * (rows / 2 + keys.dk_ld() + keys.dv_ld() + kQueries / 2) +
                       keys.depth * keys.turned_ld() / 2 + kBand * (2 * kScoresLd + kWeightsLd) +
                       kQueries * (rows + keys.depth));
  const auto take = [&](int64_t floats) { return std::exchange(free, free + floats); };
  const auto take_bf16 = [&](int64_t count) { return reinterpret_cast<bf16*>(take(count / 2)); };
  keys.k = take_bf16(most * keys.depth), keys.v = take_bf16(most * keys.value_depth);
  keys.turned_k = take_bf16(keys.depth * keys.turned_ld());
  keys.dk = take(most * keys.dk_ld()), keys.dv = take(most * keys.dv_ld());
  keys.scores = take(kBand * kScoresLd), keys.above = take(kBand * kScoresLd);
  keys.weights = take_bf16(kBand * kWeightsLd), keys.gradients = take_bf16(kBand * kWeightsLd);
  keys.pairs = take_bf16(most * kQueries);
  Queries queries;
  queries.turned_q = take_bf16(kQueries * keys.depth), queries.q = take_bf16(kQueries * keys.depth);
  queries.turned_dout = take_bf16(kQueries * keys.value_depth);
  queries.dout = take_bf16(kQueries * keys.value_depth);
  float* const dq = take(kQueries * keys.depth);

  for (int64_t first = share.begin; first < share.end; first += kKeys) {
    keys.load(p, share, first);
    for (int64_t q0 = 0; q0 < p.queries; q0 += kQueries) {
      queries.load(p, share, q0);
      for (int64_t j = 0; j < keys.count; j += kBand) keys.multiply(p, queries, j, q0 > 0);
      float* const sums = share.sums(q0);
      keys.add_dq(p, queries, sums, first > share.begin);
      if (share.finishes && first + kKeys >= share.end)
        store_dq(sums, queries.count, p.width, p.scale, dq,
                 head_of<bf16>(p.dq, share.image, share.head) + q0 * p.dq.strides[2],
                 p.dq.strides[2]);
    }
    copy_rows(keys.dk, keys.dk_ld(), keys.count, p.width, p.scale,
              head_of<bf16>(p.dk, share.image, share.head) + first * p.dk.strides[2],
              p.dk.strides[2]);
    copy_rows(keys.dv, keys.dv_ld(), keys.count, p.value_width, 1.f,
              head_of<bf16>(p.dv, share.image, share.head) + first * p.dv.strides[2],
              p.dv.strides[2]);
  }
}

}  // namespace

void attention_backward_bf16(const AttentionBackward& p, int64_t begin, int64_t end) {
  const Tiles tiles;
  for (int64_t unit = begin; unit < end; ++unit) differentiate(p, unit);
}

}  // namespace fastdiff::CPU_CAPABILITY
