// What the forward and the backward of group_norm_silu share: the unit of work, and the affine form
// of a channel.
//
// With m and r a group's mean and 1 / deviation, the value that SiLU is applied to is
//
//   u = (x + add - m) r w (1 + scale) + b (1 + scale) + shift = (x - center) gain + offset
//
// where center is m - add rounded. Subtracting center first is exact where x is near the mean, so
// that a large mean costs no accuracy. The rounding error of center goes into offset.
#pragma once

#include <cmath>

#include "cpu/kernels/group_norm_silu.h"
#include "cpu/kernels/memory.h"
#include "cpu/kernels/vectors.h"

namespace fastdiff::CPU_CAPABILITY {

// Arrays of coefficients end at a multiple of this, at least as many elements beyond the last,
// since the vectors of channels that two tensors share may begin anywhere.
constexpr int64_t kPad = 64;

// How much is summed in the wide type before it is added up in float64: elements of a run, or rows
// of pixels channels-last.
constexpr int64_t kSummedElements = 4096;
constexpr int64_t kSummedRows = 128;

#ifdef CPU_CAPABILITY_AVX512
// 1 / x with a relative error of 6e-5, for types of 16 bits.
template <class T>
FASTDIFF_INLINE Values<T> reciprocal(const Values<T>& x) {
  using V = typename Lanes<T>::V;
  return Values<T>::each(
      [](const V& v) FASTDIFF_HOT {
        return reinterpret_cast<V>(_mm512_rcp14_ps(reinterpret_cast<__m512>(v)));
      },
      x);
}
#endif

// a / b to about the precision of T.
template <class T>
FASTDIFF_INLINE Values<T> quotient(const Values<T>& a, const Values<T>& b) {
#ifdef CPU_CAPABILITY_AVX512
  if constexpr (sizeof(T) == 2) return a * reciprocal(b);
#endif
  return a / b;
}

// a / b + c. It says itself where the product and the sum are one instruction, which a compiler
// would else decide anew for each loop, with results that differ in the last bit.
template <class T>
FASTDIFF_INLINE Values<T> quotient_plus(const Values<T>& a, const Values<T>& b,
                                        const Values<T>& c) {
#ifdef CPU_CAPABILITY_AVX512
  if constexpr (sizeof(T) == 2) return fmadd(a, reciprocal(b), c);
#endif
  return a / b + c;
}

// Channels first..first+width-1 of a unit in one of the tensors that they lie in: from run to run,
// a pixel channels-last and else a channel, it is `step` elements.
template <class T>
struct Strip {
  int64_t first, width;
  T* data;
  int64_t step;
};

template <class T>
struct Unit {
  using Wide = typename Lanes<T>::Wide;
  const GroupNormSilu& a;
  int64_t n, group, groups;  // image, first group, number of groups
  int64_t per_group;         // channels in a group
  int64_t channel, width;    // first channel, number of channels

  Unit(const GroupNormSilu& args, int64_t index) : a(args) {
    const int64_t units = (a.groups + a.unit_groups - 1) / a.unit_groups;
    n = index / units;
    group = index % units * a.unit_groups;
    groups = std::min(a.groups - group, a.unit_groups);
    per_group = a.channels / a.groups;
    channel = group * per_group;
    width = groups * per_group;
  }

  int64_t padded() const { return rounded_up(width, kPad) + kPad; }

  // What a tensor, the first of whose channels is channel `offset`, has of the unit; its width may
  // be 0.
  Strip<T> strip(const NormTensor& tensor, int64_t offset) const {
    const int64_t begin = std::clamp<int64_t>(channel - offset, 0, tensor.channels);
    const int64_t end = std::clamp<int64_t>(channel + width - offset, 0, tensor.channels);
    T* image = static_cast<T*>(tensor.data);
    if (a.channels_last) {
      image += n * a.pixels * tensor.ld + begin;
    } else {
      image += (n * tensor.channels + begin) * a.pixels;
    }
    return {begin + offset - channel, end - begin, image, a.channels_last ? tensor.ld : a.pixels};
  }

  // Calls body(strip, which) for the strips of x (0) and skip (1).
  template <class Body>
  void for_inputs(Body&& body) const {
    const Strip<T> parts[] = {strip(a.x, 0), strip(a.skip, a.x.channels)};
    for (int which = 0; which < 2; ++which)
      if (parts[which].width > 0) body(parts[which], which);
  }

  // The same channels of a dense tensor of all channels.
  T* beside(const Strip<T>& part, const void* dense) const {
    const NormTensor tensor{const_cast<void*>(dense), a.channels, a.channels};
    return strip(tensor, 0).data + part.first * (a.channels_last ? 1 : a.pixels);
  }
  double* statistics(double* p) const { return p + n * a.groups + group; }
  Wide* per_channel(void* p) const { return static_cast<Wide*>(p) + n * a.channels + channel; }

  // Coefficient of channel c of the unit, or `missing`.
  double of_channel(const void* p, int64_t c, double missing) const {
    return p ? parameter(p, channel + c) : missing;
  }
  double of_image(const void* p, int64_t c, double missing) const {
    return p ? parameter(p, n * a.channels + channel + c) : missing;
  }

 private:
  double parameter(const void* p, int64_t index) const {
    return a.wide_parameters ? static_cast<const Wide*>(p)[index]
                             : static_cast<double>(static_cast<const T*>(p)[index]);
  }
};

// The affine form of every channel of a unit, as three arrays in `memory`, of u.padded() numbers
// each; gain and offset are multiplied by `factor`.
template <class T>
struct Affine {
  using Wide = typename Lanes<T>::Wide;
  Wide *center, *gain, *offset;

  Affine(const Unit<T>& u, double factor, double* memory)
      : center(reinterpret_cast<Wide*>(memory)),
        gain(center + u.padded()),
        offset(gain + u.padded()) {
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
