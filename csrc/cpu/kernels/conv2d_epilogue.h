// What a convolution writes through: bias, embedding, residual and scale; and the statistics of
// what it wrote.
//
// Of each segment and channel the sums of y - y0 and (y - y0)^2 are kept, y0 being the segment's
// first value: so a mean that is large beside the deviation costs no accuracy. The segments are
// joined in float64 (Chan, Golub & LeVeque 1983, eq. 2.1).
#pragma once

#include "cpu/kernels/conv2d.h"
#include "cpu/kernels/vectors.h"

namespace fastdiff::CPU_CAPABILITY {

// One vector of channels, k..k + lanes, of one segment. Everything is its own, so that the compiler
// knows that no write to y changes it.
template <class T, bool kStatistics>
struct Epilogue {
  int64_t lanes, filters, residual_ld;
  const T* residual;  // or null
  T* y;
  float scale;
  F add{}, first{}, sum{}, squares{};
  bool begun = false;

  FASTDIFF_INLINE void begin(const Conv2d& p, int64_t image, int64_t k) {
    lanes = std::min(kLanes, p.filters - k);
    filters = p.filters;
    residual_ld = p.residual_ld;
    residual = p.residual ? static_cast<const T*>(p.residual) + k : nullptr;
    y = static_cast<T*>(p.y) + k;
    scale = p.scale;
    if (p.bias) add = load_lanes(static_cast<const T*>(p.bias) + k, lanes);
    if (p.emb) add += load_lanes(static_cast<const T*>(p.emb) + image * p.emb_ld + k, lanes);
  }

  FASTDIFF_INLINE void write(int64_t pixel, F value) {
    value += add;
    if (residual) value += load_lanes(residual + pixel * residual_ld, lanes);
    value *= scale;
    store_lanes(y + pixel * filters, value, lanes);
    if constexpr (kStatistics) {
      // Of the rounded values: those are what the norm will see.
      if constexpr (!std::is_same_v<T, float>) value = load_lanes(y + pixel * filters, lanes);
      if (!begun) first = value, begun = true;
      const F centred = value - first;
      sum += centred;
      squares += centred * centred;
    }
  }

  // Leaves the sums in a segment's [3, K], of which `partial` is this vector's first.
  FASTDIFF_INLINE void finish(float* partial) const {
    store_lanes(partial, first, lanes);
    store_lanes(partial + filters, sum, lanes);
    store_lanes(partial + 2 * filters, squares, lanes);
  }
};

// Joins the segments' sums, [segments, 3, K], to mean and variance of each image and channel.
// `pixels(i)` is how many pixels segment i has.
template <class Pixels>
void join_statistics(const Conv2d& p, const std::vector<Segment>& segments, const float* partials,
                     Pixels&& pixels) {
  for (size_t begin = 0, end; begin < segments.size(); begin = end) {
    const int64_t image = segments[begin].image;
    for (end = begin; end < segments.size() && segments[end].image == image;) ++end;
    for (int64_t k = 0; k < p.filters; ++k) {
      double count = 0, mean = 0, squares = 0;
      for (size_t i = begin; i < end; ++i) {
        const float* partial = partials + i * 3 * p.filters + k;
        const double n = pixels(segments[i]);
        const double off = partial[p.filters] / n, delta = partial[0] + off - mean;
        squares += partial[2 * p.filters] - n * off * off + delta * delta * count * n / (count + n);
        mean += delta * n / (count + n);
        count += n;
      }
      double* out = p.statistics + (image * p.filters + k) * 2;
      out[0] = mean;
      out[1] = std::max(0., squares / count);
    }
  }
}

}  // namespace fastdiff::CPU_CAPABILITY
