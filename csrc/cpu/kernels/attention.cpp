// Attention without its matrix (Dao et al. 2022, arXiv:2205.14135): kQueries queries at a time go
// over the keys a block at a time, and keep the largest score, the sum of exponentials and the
// weighted sum of values so far. Keys and values are packed once for all queries, for gemm.h.
#include "cpu/kernels/attention.h"

#include <limits>

#include "cpu/kernels/activations.h"
#include "cpu/kernels/attention_pack.h"
#include "cpu/kernels/attention_rows.h"
#include "cpu/kernels/dtypes.h"
#include "cpu/kernels/memory.h"

namespace fastdiff::CPU_CAPABILITY {
namespace {

constexpr int64_t kKeys = 256;  // of a block
constexpr float kNone = -std::numeric_limits<float>::infinity();

template <class T>
void pack_head(const Attention& p, int64_t unit) {
  const int64_t image = unit / p.heads, head = unit % p.heads;
  const T* k = static_cast<const T*>(p.k) + image * p.k_strides[0] + head * p.k_strides[1];
  const T* v = static_cast<const T*>(p.v) + image * p.v_strides[0] + head * p.v_strides[1];
  const float factor = p.scale * static_cast<float>(kLog2e);  // the softmax is of powers of 2
  float* to = static_cast<float*>(p.packed_k) + unit * attention_packed(p.keys, p.width);
  for (int64_t first = 0; first < p.keys; first += kPanel) {
    const int64_t columns = std::min(kPanel, p.keys - first), packed = packed_columns(columns);
    transpose_rows(k + first * p.k_strides[2], p.k_strides[2], columns, p.width, factor, to,
                   packed);
    to += p.width * packed;
  }
  to = static_cast<float*>(p.packed_v) + unit * attention_packed(p.keys, p.value_width);
  for (int64_t begin = 0; begin < p.keys; begin += kKeys)
    to = pack_panels(v + begin * p.v_strides[2], p.v_strides[2], std::min(kKeys, p.keys - begin),
                     p.value_width, to);
}

// The vector of values[j] and the following, where lanes past `count` values are `fill`.
FASTDIFF_INLINE F last_lanes(const float* values, int64_t j, int64_t count, float fill) {
  F value = load_lanes(values + j);
  for (int64_t i = count - j; i < kLanes; ++i) value[i] = fill;
  return value;
}

// Largest of the first `count` values, `worst` or more.
inline float largest(const float* values, int64_t count, float worst) {
  F found = worst - F{};
  const auto include = [&](F value) FASTDIFF_HOT { found = found > value ? found : value; };
  int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes) include(load_lanes(values + j));
  if (j < count) include(last_lanes(values, j, count, worst));
  for (int64_t half = kLanes / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; ++i) found[i] = std::max(found[i], found[i + half]);
  return found[0];
}

// values = 2^(values - top), top being the largest; returns the sums of each lane.
inline F exponentials(float* values, int64_t count, float top) {
  F sum{};
  const auto replace = [&](int64_t j, F value) FASTDIFF_HOT {
    value = exp2_lanes<true>(value - top);
    store_lanes(values + j, value);
    sum += value;
  };
  int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes) replace(j, load_lanes(values + j));
  if (j < count) replace(j, last_lanes(values, j, count, kNone));
  return sum;
}

template <class T>
void attend(const Attention& p, int64_t unit, int64_t begin) {
  static thread_local Scratch scratch;
  const int64_t image = unit / p.heads, head = unit % p.heads;
  const int64_t count = std::min(kQueries, p.queries - begin);
  const int64_t scores_ld = kKeys + kLine, out_ld = packed_columns(p.value_width) + kLine;
  float* scores = scratch.at_least(kQueries * (scores_ld + out_ld + p.width));
  float *out = scores + kQueries * scores_ld, *wide = out + kQueries * out_ld;
  const T* q = static_cast<const T*>(p.q) + image * p.q_strides[0] + head * p.q_strides[1];
  const float *rows[kQueries], *weights[kQueries];
  float top[kQueries];
  F sums[kQueries] = {};  // of each lane
  for (int64_t i = 0; i < count; ++i) {
    const T* row = q + (begin + i) * p.q_strides[2];
    if constexpr (std::is_same_v<T, float>) {
      rows[i] = row;
    } else {
      for (int64_t d = 0; d < p.width; ++d) wide[i * p.width + d] = static_cast<float>(row[d]);
      rows[i] = wide + i * p.width;
    }
    weights[i] = scores + i * scores_ld;
    top[i] = kNone;
  }
  const float* keys =
      static_cast<const float*>(p.packed_k) + unit * attention_packed(p.keys, p.width);
  const float* values =
      static_cast<const float*>(p.packed_v) + unit * attention_packed(p.keys, p.value_width);
  for (int64_t k0 = 0; k0 < p.keys; k0 += kKeys) {
    const int64_t block = std::min(kKeys, p.keys - k0);
    for (int64_t k = 0; k < block; k += kPanel) {
      const int64_t columns = std::min(kPanel, block - k);
      const float* panel = keys + (k0 + k) * p.width;
      multiply_in_pieces(count, rows, p.width, panel, columns, true,
                         {scores + k, scores_ld, false});
    }
    for (int64_t i = 0; i < count; ++i) {
      float* row = scores + i * scores_ld;
      const float now = largest(row, block, top[i]);
      const float shrink = now == top[i] ? 1.f : std::exp2(top[i] - now);
      // If all scores so far are -inf, subtracting their maximum would give NaN.
      sums[i] = sums[i] * shrink + exponentials(row, block, now == kNone ? 0.f : now);
      top[i] = now;
      if (k0 > 0 && shrink != 1.f)
        for (int64_t c = 0; c < p.value_width; c += kLanes)
          store_lanes(out + i * out_ld + c, load_lanes(out + i * out_ld + c) * shrink);
    }
    for (int64_t first = 0, columns; first < p.value_width; first += columns) {
      columns = panel_columns(p.value_width - first);
      const float* panel = values + first * block;
      multiply_panel(count, weights, 0, block, panel, columns,
                     {panel + packed_columns(columns) * block}, Into{out + first, out_ld, k0 > 0});
    }
    values += block * packed_columns(p.value_width);
  }
  for (int64_t i = 0; i < count; ++i) {
    float sum = 0;
    for (int64_t lane = 0; lane < kLanes; ++lane) sum += sums[i][lane];
    if (top[i] == kNone) sum = std::numeric_limits<float>::quiet_NaN();  // as PyTorch has it
    if (p.statistics) {
      float* const at = p.statistics + unit * p.queries + begin + i;
      at[0] = top[i];
      at[p.batch * p.heads * p.queries] = sum;
    }
    T* to =
        static_cast<T*>(p.out) + ((image * p.queries + begin + i) * p.heads + head) * p.value_width;
    for (int64_t c = 0; c < p.value_width; c += kLanes)
      store_lanes(to + c, load_lanes(out + i * out_ld + c) / sum, p.value_width - c);
  }
}

}  // namespace

void attention_pack(const Attention& p, int64_t begin, int64_t end) {
  for_float_or_bfloat16(p.dtype, [&]<class T>() {
    for (int64_t unit = begin; unit < end; ++unit) pack_head<T>(p, unit);
  });
}

void attention(const Attention& p, int64_t begin, int64_t end) {
  const int64_t each = (p.queries + kQueries - 1) / kQueries;  // units of an image's head
  for_float_or_bfloat16(p.dtype, [&]<class T>() {
    for (int64_t unit = begin; unit < end; ++unit)
      attend<T>(p, unit / each, unit % each * kQueries);
  });
}

}  // namespace fastdiff::CPU_CAPABILITY
