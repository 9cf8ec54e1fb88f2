// What forward and backward of group_norm_silu share: the unit of work and a channel's affine form.
//
// With m and r a group's mean and 1 / deviation, the value that SiLU is applied to is
//
//   u = (x + add - m) r w (1 + scale) + b (1 + scale) + shift = (x - center) gain + offset
//
// where center is m - add rounded: subtracting it first is exact where x is near the mean, so that
// a large mean costs no accuracy. What the rounding left out goes into offset.
#pragma once

#include <cmath>

#include "cpu/kernels/group_norm_silu.h"
#include "cpu/kernels/lanes.h"

namespace fastdiff::CPU_CAPABILITY {

constexpr int64_t kPad = 64;  // arrays of coefficients are padded to this many elements

// What is summed in the wide type before it is added up in double: pixels that lie together, or
// channels-last rows of pixels.
constexpr int64_t kBlockRun = 4096;
constexpr int64_t kBlockRows = 128;

// Hands out the arrays of one unit.
struct Scratch {
  char* free;

  template <class U>
  U* take(int64_t count) {
    U* out = reinterpret_cast<U*>(free);
    free += count * sizeof(U);
    return out;
  }
};

template <class T>
struct Unit {
  using Wide = typename Lanes<T>::Wide;
  const GroupNormSilu& a;
  int64_t n, group, groups;  // image, first group, number of groups
  int64_t per_group;         // channels in a group
  int64_t channel, width;    // first channel, number of channels
  int64_t origin, stride;    // first element; from one pixel (or channel) to the next

  Unit(const GroupNormSilu& args, int64_t index) : a(args) {
    const int64_t slices = (a.groups + a.slice - 1) / a.slice;
    n = index / slices;
    group = index % slices * a.slice;
    groups = a.groups - group < a.slice ? a.groups - group : a.slice;
    per_group = a.channels / a.groups;
    channel = group * per_group;
    width = groups * per_group;
    stride = a.channels_last ? a.channels : a.pixels;
    origin = n * a.channels * a.pixels + channel * (a.channels_last ? 1 : a.pixels);
  }

  int64_t padded() const { return (width + kPad - 1) / kPad * kPad; }
  const T* at(const void* p) const { return static_cast<const T*>(p) + origin; }
  T* at(void* p) const { return static_cast<T*>(p) + origin; }
  double* statistics(double* p) const { return p + n * a.groups + group; }
  Wide* per_channel(void* p) const { return static_cast<Wide*>(p) + n * a.channels + channel; }

  // Coefficient of channel c of the unit, or `missing`.
  double of_channel(const void* p, int64_t c, double missing) const {
    return p ? static_cast<double>(static_cast<const T*>(p)[channel + c]) : missing;
  }
  double of_image(const void* p, int64_t c, double missing) const {
    return p ? static_cast<double>(static_cast<const T*>(p)[n * a.channels + channel + c])
             : missing;
  }
};

// The affine form of every channel of a unit, as three arrays; gain and offset times `factor`.
template <class T>
struct Affine {
  using Wide = typename Lanes<T>::Wide;
  Wide *center, *gain, *offset;

  Affine(const Unit<T>& u, double factor, Scratch& scratch)
      : center(scratch.take<Wide>(u.padded())),
        gain(scratch.take<Wide>(u.padded())),
        offset(scratch.take<Wide>(u.padded())) {
    const double *mean = u.statistics(u.a.mean), *rstd = u.statistics(u.a.rstd);
    for (int64_t c = 0; c < u.width; ++c) {
      const double m = mean[c / u.per_group] - u.of_image(u.a.add, c, 0);
      const double grow = 1 + u.of_image(u.a.scale, c, 0);
      const double w = rstd[c / u.per_group] * u.of_channel(u.a.weight, c, 1) * grow;
      const double b = u.of_channel(u.a.bias, c, 0) * grow + u.of_image(u.a.shift, c, 0);
      center[c] = static_cast<Wide>(m);
      gain[c] = static_cast<Wide>(factor * w);
      offset[c] = static_cast<Wide>(factor * ((center[c] - m) * w + b));
    }
  }
};

}  // namespace fastdiff::CPU_CAPABILITY
