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

// One vector of channels, k..k + lanes, of one segment.
template <class T>
struct Epilogue {
  const Conv2d& p;
  const int64_t k, lanes;
  F add{}, first{}, sum{}, squares{};
  bool begun = false;

  FASTDIFF_INLINE Epilogue(const Conv2d& p, int64_t image, int64_t k)
      : p(p), k(k), lanes(std::min(kLanes, p.filters - k)) {
    if (p.bias) add = load_lanes(static_cast<const T*>(p.bias) + k, lanes);
    if (p.emb) add += load_lanes(static_cast<const T*>(p.emb) + image * p.emb_ld + k, lanes);
  }

  FASTDIFF_INLINE void write(int64_t pixel, F value) {
    value += add;
    if (p.residual)
      value += load_lanes(static_cast<const T*>(p.residual) + pixel * p.residual_ld + k, lanes);
    value *= p.scale;
    store_lanes(static_cast<T*>(p.y) + pixel * p.filters + k, value, lanes);
    if (!p.statistics) return;
    if (!begun) first = value, begun = true;
    const F centred = value - first;
    sum += centred;
    squares += centred * centred;
  }

  // Leaves the sums in a segment's [3, K].
  FASTDIFF_INLINE void finish(float* partial) const {
    if (!p.statistics) return;
    store_lanes(partial + k, first, lanes);
    store_lanes(partial + p.filters + k, sum, lanes);
    store_lanes(partial + 2 * p.filters + k, squares, lanes);
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
