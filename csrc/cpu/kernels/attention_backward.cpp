// The gradients of attention without its matrix (Dao et al. 2022, arXiv:2205.14135; the loops are
// those of Dao 2023, arXiv:2307.08691, algorithm 2). With P = exp(scale q k^T) / sum and
// delta = sum(dout * out) of each query,
//   dv = P^T dout,  dS = P * (dout v^T - delta),  dk = scale dS^T q,  dq = scale dS k.
//
// A block of keys goes over the queries, a block at a time, and P and dS of the two blocks stay in
// the cache. Both are computed transposed, a row for each key: then their rows are those of A in
// the products for dv and dk, dS is B as gemm.h wants it in the product k^T dS^T for dq, and what
// belongs to a query is a vector like any row: nothing is summed up across lanes.
//
// q, k, v, out, dout are read once for each block of the other side, from the cache if a head has
// one block of keys, and dk and dv are written once. dq is summed up in float32 over the blocks of
// keys. Five products are computed, the least that does not store P.
#include "cpu/kernels/attention_backward.h"

#include "cpu/kernels/activations.h"
#include "cpu/kernels/attention_backward_heads.h"
#include "cpu/kernels/attention_pack.h"
#include "cpu/kernels/dtypes.h"

namespace fastdiff::CPU_CAPABILITY {
namespace {

constexpr int64_t kKeys = kBackwardKeys, kQueries = kBackwardQueries;

// C (+)= A B: `rows` rows of A, which lie lda apart, and one panel of B.
void multiply_rows(const float* a, int64_t lda, int64_t rows, int64_t depth, const float* b,
                   int64_t columns, const Into& out) {
  constexpr int64_t kMost = 16 * kRows;
  for (int64_t first = 0; first < rows; first += kMost) {
    const int64_t count = std::min(kMost, rows - first);
    const float* each[kMost];
    for (int64_t i = 0; i < count; ++i) each[i] = a + (first + i) * lda;
    multiply_in_pieces(count, each, depth, b, columns, false, out.below(first));
  }
}

// C (+)= A B of all panels of B, as pack_panels has made them.
void multiply_panels(const float* a, int64_t lda, int64_t rows, int64_t depth, const float* b,
                     int64_t width, const Into& out) {
  for (int64_t first = 0, columns; first < width; first += columns) {
    columns = panel_columns(width - first);
    multiply_rows(a, lda, rows, depth, b + first * depth, columns,
                  {out.c + first, out.ld, out.accumulate});
  }
}

// A block of queries as operands of the products.
struct Queries {
  int64_t count, ld;              // and `count` in whole vectors
  float *turned_q, *turned_dout;  // in panels of queries: B of the scores and of dP^T
  float *q, *dout;                // in panels of columns: B of dk and dv
  QueryStatistics of;

  template <class T>
  void load(const AttentionBackward& p, const Share& share, int64_t first) {
    count = std::min(kQueries, p.queries - first);
    ld = packed_columns(count);
    const auto pack = [&](const HeadRows<const void*>& x, int64_t width, float* turned,
                          float* panels) {
      const int64_t stride = x.strides[2];
      const T* rows = head_of<const T>(x, share.image, share.head) + first * stride;
      for (int64_t c = 0; c < count; c += kPanel) {
        const int64_t columns = std::min(kPanel, count - c);
        transpose_rows(rows + c * stride, stride, columns, width, 1.f, turned + c * width,
                       packed_columns(columns));
      }
      pack_panels(rows, stride, count, width, panels);
    };
    pack(p.q, p.width, turned_q, q);
    pack(p.dout, p.value_width, turned_dout, dout);
    of.load<T>(p, share, first, count);
  }
};

// A block of keys: operands, the sums of its gradients, and its products with a block of queries.
struct Keys {
  int64_t count;
  int64_t ld, value_ld, turned_ld;  // of rows of whole vectors
  float *k, *v, *turned_k;          // A of the scores, in powers of 2, of dP^T and of dq
  float *dk, *dv;
  float *weights, *gradients;  // P^T and dS^T, rows as long as Queries::ld
  float* panels;               // dS^T as B of dq

  // For its products with the queries, `accumulate` being false for the first of them.
  void multiply(const AttentionBackward& p, const Queries& queries, bool accumulate) {
    const int64_t rows = queries.ld;
    for (int64_t c = 0; c < queries.count; c += kPanel) {
      const int64_t columns = std::min(kPanel, queries.count - c);
      multiply_rows(k, ld, count, p.width, queries.turned_q + c * p.width, columns,
                    {weights + c, rows, false});
      multiply_rows(v, value_ld, count, p.value_width, queries.turned_dout + c * p.value_width,
                    columns, {gradients + c, rows, false});
    }
    for (int64_t j = 0; j < count; ++j) weigh(queries, weights + j * rows, gradients + j * rows);
    multiply_panels(weights, rows, count, queries.count, queries.dout, p.value_width,
                    {dv, value_ld, accumulate});
    multiply_panels(gradients, rows, count, queries.count, queries.q, p.width,
                    {dk, ld, accumulate});
  }

  // Adds their part to the sums of the queries' rows of dq.
  void add_dq(const AttentionBackward& p, const Queries& queries, float* sums, bool accumulate) {
    const int64_t rows = queries.ld;
    for (int64_t c = 0; c < queries.count; c += kPanel) {
      const int64_t columns = std::min(kPanel, queries.count - c), packed = packed_columns(columns);
      if constexpr (kPanel < kQueries)
        for (int64_t j = 0; j < count; ++j)
          for (int64_t i = 0; i < packed; i += kLanes)
            store_lanes(panels + c * count + j * packed + i,
                        load_lanes(gradients + j * rows + c + i));
      multiply_rows(turned_k, turned_ld, p.width, count, panels + c * count, columns,
                    {sums + c, kQueries, accumulate});
    }
  }

  // A key's scores become its weights, and its row of dP^T one of dS^T.
  static void weigh(const Queries& queries, float* scores, float* gradients) {
    for (int64_t c = 0; c < queries.ld; c += kLanes) {
      const F power = load_lanes(scores + c) - load_lanes(queries.of.largest + c);
      // What underflows is zero, since it may yet be multiplied by an infinite key.
      const F raised = power < -126.f ? F{} : exp2_lanes<true>(power);
      const F weight = raised * load_lanes(queries.of.inverse + c);
      const F above = load_lanes(gradients + c) - load_lanes(queries.of.delta + c);
      store_lanes(scores + c, weight);
      store_lanes(gradients + c, weight * above);
    }
  }
};

template <class T>
void differentiate(const AttentionBackward& p, int64_t unit) {
  static thread_local Scratch scratch;
  Share share(p, unit);
  const int64_t most = std::min(kKeys, p.keys), both = most * kQueries;
  Keys keys{.ld = packed_columns(p.width),
            .value_ld = packed_columns(p.value_width),
            .turned_ld = packed_columns(most)};
  const int64_t rows = keys.ld + keys.value_ld;
  float* free = scratch.at_least(2 * most * rows + p.width * keys.turned_ld + 3 * both +
                                 2 * kQueries * rows + kQueries * keys.ld);
  const auto take = [&](int64_t floats) { return std::exchange(free, free + floats); };
  keys.k = take(most * keys.ld), keys.dk = take(most * keys.ld);
  keys.v = take(most * keys.value_ld), keys.dv = take(most * keys.value_ld);
  keys.turned_k = take(p.width * keys.turned_ld);
  keys.weights = take(both), keys.gradients = take(both);
  keys.panels = kPanel < kQueries ? take(both) : keys.gradients;
  Queries queries;
  queries.turned_q = take(kQueries * keys.ld), queries.q = take(kQueries * keys.ld);
  queries.turned_dout = take(kQueries * keys.value_ld),
  queries.dout = take(kQueries * keys.value_ld);
  float* const dq = take(kQueries * keys.ld);

  for (int64_t first = share.begin; first < share.end; first += kKeys) {
    keys.count = std::min(kKeys, share.end - first);
    const T* k = head_of<const T>(p.k, share.image, share.head) + first * p.k.strides[2];
    const T* v = head_of<const T>(p.v, share.image, share.head) + first * p.v.strides[2];
    copy_rows(k, p.k.strides[2], keys.count, p.width, p.scale * static_cast<float>(kLog2e), keys.k,
              keys.ld);
    copy_rows(v, p.v.strides[2], keys.count, p.value_width, 1.f, keys.v, keys.value_ld);
    transpose_rows(k, p.k.strides[2], keys.count, p.width, 1.f, keys.turned_k, keys.turned_ld);
    for (int64_t q0 = 0; q0 < p.queries; q0 += kQueries) {
      queries.load<T>(p, share, q0);
      keys.multiply(p, queries, q0 > 0);
      float* const sums = share.sums(q0);
      keys.add_dq(p, queries, sums, first > share.begin);
      if (share.finishes && first + kKeys >= share.end)
        store_dq(sums, queries.count, p.width, p.scale, dq,
                 head_of<T>(p.dq, share.image, share.head) + q0 * p.dq.strides[2], p.dq.strides[2]);
    }
    copy_rows(keys.dk, keys.ld, keys.count, p.width, p.scale,
              head_of<T>(p.dk, share.image, share.head) + first * p.dk.strides[2], p.dk.strides[2]);
    copy_rows(keys.dv, keys.value_ld, keys.count, p.value_width, 1.f,
              head_of<T>(p.dv, share.image, share.head) + first * p.dv.strides[2], p.dv.strides[2]);
  }
}

template <class T>
void join(const AttentionBackward& p, int64_t unit) {
  static thread_local Scratch scratch;
  const int64_t each = query_blocks(p.queries), head = unit / each, first = unit % each * kQueries;
  const int64_t width = attention_backward_width(p.width), floats = kQueries * width;
  const int64_t apart = attention_backward_sums(p.queries, p.width);
  float* const rows = scratch.at_least(kQueries * packed_columns(p.width));
  float* const sums = p.sums + head * p.shares * apart + first * width;
  for (int64_t share = 1; share < p.shares; ++share)
    for (int64_t i = 0; i < floats; i += kLanes)
      store_lanes(sums + i, load_lanes(sums + i) + load_lanes(sums + share * apart + i));
  store_dq(sums, std::min(kQueries, p.queries - first), p.width, p.scale, rows,
           head_of<T>(p.dq, head / p.heads, head % p.heads) + first * p.dq.strides[2],
           p.dq.strides[2]);
}

}  // namespace

void attention_backward(const AttentionBackward& p, int64_t begin, int64_t end) {
  for_float_or_bfloat16(p.dtype, [&]<class T>() {
    for (int64_t unit = begin; unit < end; ++unit) differentiate<T>(p, unit);
  });
}

void attention_backward_dq(const AttentionBackward& p, int64_t begin, int64_t end) {
  for_float_or_bfloat16(p.dtype, [&]<class T>() {
    for (int64_t unit = begin; unit < end; ++unit) join<T>(p, unit);
  });
}

}  // namespace fastdiff::CPU_CAPABILITY
