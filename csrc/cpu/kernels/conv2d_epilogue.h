// What a convolution writes through: bias, embedding, residual and scale; and the statistics of
// what it wrote.
//
// Of every 32 pixels or so the sums of y - y0 and (y - y0)^2 are kept, y0 being the first of them,
// and joined by moments.h: so a single large value costs no accuracy either.
#pragma once

#include "cpu/kernels/activations.h"
#include "cpu/kernels/conv2d_grid.h"
#include "cpu/kernels/moments.h"

namespace fastdiff::CPU_CAPABILITY {

constexpr int64_t kTogether = 32;   // pixels
constexpr int64_t kRun = 8;         // pixels of a line that are written together
constexpr int64_t kNear = 1 << 18;  // elements of y that are in L2 when they are written

// What a run of pixels adds to the sums of one vector of channels. A struct of its own, which stays
// in registers: the compiler must assume that a write to y may change an object's members.
struct Sums {
  F first, sum{}, squares{};
};

// Where one vector of channels, k..k + lanes, of one segment goes, and what is added to it: copies
// of what is needed of Conv2d. A copy of a whole Output may stay in registers.
template <class T, bool kStatistics>
struct Output {
  int64_t lanes, filters, residual_ld;
  const T* residual;  // or null
  T* y;
  float scale;
  F add{};

  FASTDIFF_INLINE void begin(const Conv2d& p, int64_t image, int64_t k) {
    lanes = std::min(kLanes, p.filters - k);
    filters = p.filters;
    residual_ld = p.residual_ld;
    residual = p.residual ? static_cast<const T*>(p.residual) + k : nullptr;
    y = static_cast<T*>(p.y) + k;
    scale = p.scale;
    if (p.bias) add = load_lanes(static_cast<const T*>(p.bias) + k, lanes);
    if (p.emb) add += load_lanes(static_cast<const T*>(p.emb) + image * p.emb_ld + k, lanes);
    add *= scale;
  }

  FASTDIFF_INLINE void write(int64_t pixel, F value, Sums& sums) const {
    put(y + pixel * filters, residual_at(pixel), lanes, value, sums);
  }

  // The same where no lane is missing.
  FASTDIFF_INLINE void write_whole(int64_t pixel, F value, Sums& sums) const {
    put(y + pixel * filters, residual_at(pixel), kLanes, value, sums);
  }

  // `values` [m, m] of pixels that are `down` and `across` apart.
  template <int m>
  FASTDIFF_INLINE void write_tile(int64_t pixel, int64_t down, int64_t across, const F* values,
                                  Sums& sums) const {
    T* to = y + pixel * filters;
    const T* from = residual_at(pixel);
    // Three calls, so that neither condition is tested again for each pixel.
    if (lanes < kLanes) {
      put_tile<m>(to, from, down, across, lanes, values, sums);
    } else if (from) {
      put_tile<m>(to, from, down, across, kLanes, values, sums);
    } else {
      put_tile<m>(to, nullptr, down, across, kLanes, values, sums);
    }
  }

  // The residual goes into L2 only: in L1 its lines would displace those of y, of the same sets.
  FASTDIFF_INLINE void prefetch(int64_t pixel) const {
    __builtin_prefetch(y + pixel * filters, 1);
    if (residual) __builtin_prefetch(residual + pixel * residual_ld, 0, 2);
  }

  FASTDIFF_INLINE const T* residual_at(int64_t pixel) const {
    return residual ? residual + pixel * residual_ld : nullptr;
  }

  // `from` is the residual's channels, `count` of them, or null.
  FASTDIFF_INLINE F finished(const T* from, int64_t count, F value) const {
    value = value * scale + add;
    if (from) value += load_lanes(from, count) * scale;
    return value;
  }

  FASTDIFF_INLINE void put(T* to, const T* from, int64_t count, F value, Sums& sums) const {
    value = finished(from, count, value);
    store_lanes(to, value, count);
    if constexpr (kStatistics) {
      // The statistics are of the rounded values, since the next norm reads those.
      if constexpr (!std::is_same_v<T, float>) value = load_lanes(to, count);
      const F centred = value - sums.first;
      sums.sum += centred;
      sums.squares += centred * centred;
    }
  }

  template <int m>
  FASTDIFF_INLINE void put_tile(T* to, const T* from, int64_t down, int64_t across, int64_t count,
                                const F* values, Sums& sums) const {
#pragma GCC unroll 4
    for (int a = 0; a < m; ++a)
#pragma GCC unroll 4
      for (int q = 0; q < m; ++q) {
        const int64_t pixel = a * down + q * across;
        put(to + pixel * filters, from ? from + pixel * residual_ld : nullptr, count,
            values[a * m + q], sums);
      }
  }
};

// One vector of channels of one segment, with the statistics of what was written.
template <class T, bool kStatistics>
struct Epilogue : Output<T, kStatistics> {
  F first{}, sum{}, squares{};
  int64_t pending = 0, joined = 0;  // pixels in the sums, and in mean and deviations
  double mean[kLanes] = {}, deviations[kLanes] = {};

  // Values of `count` pixels follow, of which `value` is the first.
  FASTDIFF_INLINE void expect(int64_t count, int64_t pixel, F value) {
    if constexpr (kStatistics) {
      if (pending >= kTogether) join();
      if (pending == 0) {
        first = this->finished(this->residual_at(pixel), this->lanes, value);
        if constexpr (!std::is_same_v<T, float>) {
          T rounded[kLanes];
          store_lanes(rounded, first);
          first = load_lanes(rounded);
        }
      }
      pending += count;
    }
  }

  FASTDIFF_INLINE void include(const Sums& sums) {
    sum += sums.sum;
    squares += sums.squares;
  }

  void join() {
    const JoinChannels moments(joined, pending);
    for (int64_t i = 0; i < kLanes; ++i)
      moments.join_sums(mean[i], deviations[i], first[i], sum[i], squares[i]);
    sum = squares = F{};
    joined += pending;
    pending = 0;
  }

  // Leaves mean and deviations in a segment's [2, K], of which `partial` is this vector's first.
  void finish(double* partial) {
    if (pending > 0) join();
    for (int64_t i = 0; i < this->lanes; ++i) {
      partial[i] = mean[i];
      partial[this->filters + i] = deviations[i];
    }
  }
};

// Channels begin..end of one segment, at most kChannels.
template <class T, bool kStatistics, int64_t kChannels>
struct Epilogues {
  const int64_t vectors;
  const bool far;
  Epilogue<T, kStatistics> each[kChannels / kLanes];

  Epilogues(const Conv2d& p, int64_t image, int64_t begin, int64_t end)
      : vectors((end - begin + kLanes - 1) / kLanes),
        far(p.images * p.out_height * p.out_width * p.filters > kNear) {
    for (int64_t v = 0; v < vectors; ++v) each[v].begin(p, image, begin + v * kLanes);
  }

  FASTDIFF_INLINE Epilogue<T, kStatistics>& operator[](int64_t v) { return each[v]; }

  // The cache lines that writing the pixel's vector v will touch.
  FASTDIFF_INLINE void prefetch(int64_t pixel, int64_t v = 0) const {
    if (far) each[v].prefetch(pixel);
  }

  // `count` pixels, at most kRun, each `step` after the last, whose products lie `ld` apart. Two
  // vectors of a pixel are written together, since two of bfloat16 are one line of the cache.
  FASTDIFF_INLINE void write_run(int64_t pixel, int64_t count, const float* from, int64_t ld,
                                 int64_t step = 1) {
    int64_t v = 0;
    for (; v + 1 < vectors && each[v + 1].lanes == kLanes; v += 2)
      write_vectors<2, true>(v, pixel, count, from + v * kLanes, ld, step);
    for (; v < vectors; ++v) write_vectors<1, false>(v, pixel, count, from + v * kLanes, ld, step);
  }

  // Leaves mean and deviations in a segment's [2, K], of which `partial` is the first channel's.
  void finish(double* partial) {
    for (int64_t v = 0; v < vectors; ++v) each[v].finish(partial + v * kLanes);
  }

 private:
  template <int kCount, bool kWhole>
  FASTDIFF_INLINE void write_vectors(int64_t v, int64_t pixel, int64_t count, const float* from,
                                     int64_t ld, int64_t step) {
    Output<T, kStatistics> to[kCount];
    Sums sums[kCount];
    for (int c = 0; c < kCount; ++c) {
      each[v + c].expect(count, pixel, load_lanes(from + c * kLanes));
      to[c] = each[v + c];
      sums[c].first = each[v + c].first;
    }
    const bool prefetches = far && v * kLanes % kLine == 0;
    for (int64_t i = 0; i < count; ++i, from += ld) {
      if (prefetches) to[0].prefetch(pixel + (i + kRun) * step);
#pragma GCC unroll 2
      for (int c = 0; c < kCount; ++c) {
        const F value = load_lanes(from + c * kLanes);
        if constexpr (kWhole) {
          to[c].write_whole(pixel + i * step, value, sums[c]);
        } else {
          to[c].write(pixel + i * step, value, sums[c]);
        }
      }
    }
    for (int c = 0; c < kCount; ++c) each[v + c].include(sums[c]);
  }
};

// Channels begin..end of a gated convolution's y = a * gelu(b), at most kChannels.
template <class T, int64_t kChannels>
struct Gated {
  static constexpr int64_t kVectors = kChannels / kLanes;
  const int64_t vectors, channels;
  T* const y;
  const bool far;
  F value[kVectors], gate[kVectors];  // biases

  Gated(const Conv2d& p, int64_t begin, int64_t end)
      : vectors((end - begin) / kLanes),
        channels(p.filters / 2),
        y(static_cast<T*>(p.y) + begin),
        far(p.images * p.out_height * p.out_width * channels > kNear) {
    const T* bias = static_cast<const T*>(p.bias);
    for (int64_t v = 0; v < vectors; ++v) {
      value[v] = bias ? load_lanes(bias + begin + v * kLanes) : F{};
      gate[v] = bias ? load_lanes(bias + channels + begin + v * kLanes) : F{};
    }
  }

  // `count` pixels, at most kRun, each `step` after the last, whose products lie `ld` apart, a's
  // before b's.
  FASTDIFF_INLINE void write_run(int64_t pixel, int64_t count, const float* from, int64_t ld,
                                 int64_t step = 1) {
    for (int64_t v = 0; v < vectors; ++v) {
      const float *a = from + v * kLanes, *b = a + vectors * kLanes;
      T* to = y + pixel * channels + v * kLanes;
      for (int64_t i = 0; i < count; ++i, a += ld, b += ld, to += channels * step) {
        if (far && v * kLanes % kLine == 0) __builtin_prefetch(to + kRun * channels * step, 1);
        store_lanes(to, (load_lanes(a) + value[v]) * gelu(load_lanes(b) + gate[v]));
      }
    }
  }
};

// Joins the means and squared deviations of segments and phases, [segments, phases, 2, K], to the
// mean and variance of each image and channel. `pixels(segment)` is how many pixels a segment has
// in each phase.
template <class Pixels>
void join_statistics(const Conv2d& p, const Array<Segment>& segments, int64_t phases,
                     const double* partials, Pixels&& pixels) {
  for (int64_t begin = 0, end; begin < segments.size(); begin = end) {
    const int64_t image = segments[begin].image;
    for (end = begin; end < segments.size() && segments[end].image == image;) ++end;
    double* out = p.y_statistics + image * p.filters * 2;
    for (int64_t k = 0; k < p.filters; ++k) {
      Moments moments;
      for (int64_t i = begin * phases; i < end * phases; ++i) {
        const double* partial = partials + i * 2 * p.filters + k;
        moments.join(pixels(segments[i / phases]), partial[0], partial[p.filters]);
      }
      out[2 * k] = moments.mean;
      out[2 * k + 1] = moments.m2 / moments.count;
    }
  }
}

}  // namespace fastdiff::CPU_CAPABILITY
