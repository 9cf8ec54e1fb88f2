// One row of a sampler's table (fastdiff/samplers/table.py): with m the model's output, z noise,
//
//   m  = m_u + guidance (m_c - m_u), times a factor of the image's if guidance is rescaled
//   x0 = clamp(x0_x x + x0_m m, low, high), or clamp(.., -s, s) / s with a limit s of the image's
//   x' = out_x x + out_x0 x0 + out_m m + sum h_j history_j + noise exp((logvar + logvar_v v) / 2) z
//   history[slot] = keep_x x + keep_x0 x0 + keep_m m + keep_noise z
//
// Reads x, m (m_u and m_c), v, z and the slots with a coefficient once, and writes x' and the slot:
// 3 L for latents of L bytes without guidance, history and noise, which is the least there is.
// Noise from a seed is computed into a buffer on the stack, piece by piece, and never goes to
// memory.
//
// Tensors are walked flat, whatever their layout, except a model's output with variance channels.
// In it m and v follow each other, image by image (channels-first) or pixel by pixel
// (channels-last). In the second case m and v of a piece are first copied into arrays of their own.
// What a row needs is tested once for every four vectors, which takes no measurable time and saves
// some hundred variants of the kernel. Rows that do not use x0 have a variant, since few of their
// coefficients then wait in memory for a register: they take a sixth less time.
#include "cpu/kernels/sampler_step.h"

#include <cmath>

#include "cpu/kernels/activations.h"
#include "cpu/kernels/dtypes.h"
#include "cpu/kernels/philox.h"

namespace fastdiff::CPU_CAPABILITY {
namespace {

constexpr int64_t kPiece = 1024;

// Elements begin..begin+count-1 of x, with what the model gave for them. All are of one image, if
// `length` is an image's.
template <class T>
struct Piece {
  int64_t begin, count, image;
  const T *m, *conditional, *v;  // m_u and m_c with guidance
  FASTDIFF_INLINE Piece(int64_t begin, int64_t count, int64_t image)
      : begin(begin), count(count), image(image), m(nullptr), conditional(nullptr), v(nullptr) {}
};

// Room for a piece of m, of the conditional m and of v, where these are interleaved.
template <class T>
struct Apart {
  T m[kPiece], conditional[kPiece], v[kPiece];
};

// Copies elements begin..begin+count-1 of the first half of the channels of all pixels, which have
// 2 * channels each. kChannels is `channels` where the loop over them is to be unrolled, else 0.
template <class T, int64_t kChannels>
void gather_pixels(const T* pixels, int64_t channels, int64_t begin, int64_t count, T* out) {
  if constexpr (kChannels > 0) channels = kChannels;
  const T* pixel = pixels + begin / channels * 2 * channels;
  const T* end = out + count;
  for (int64_t c = begin % channels; c > 0 && out < end; c = 0, pixel += 2 * channels)
    for (; c < channels && out < end; ++c) *out++ = pixel[c];
  for (; end - out >= channels; pixel += 2 * channels, out += channels)
    for (int64_t c = 0; c < channels; ++c) out[c] = pixel[c];
  for (int64_t c = 0; out < end; ++c) *out++ = pixel[c];
}

template <class T>
void gather(const T* pixels, int64_t channels, int64_t begin, int64_t count, T* out) {
  switch (channels) {
    case 1:
      return gather_pixels<T, 1>(pixels, channels, begin, count, out);
    case 3:
      return gather_pixels<T, 3>(pixels, channels, begin, count, out);
    case 4:
      return gather_pixels<T, 4>(pixels, channels, begin, count, out);
    default:
      return gather_pixels<T, 0>(pixels, channels, begin, count, out);
  }
}

// Calls body for the pieces of elements begin..end-1.
template <class T, class Body>
FASTDIFF_INLINE void for_pieces(const SamplerStepArgs& a, int64_t begin, int64_t end, Apart<T>& to,
                                Body&& body) {
  while (begin < end) {
    const int64_t image = begin / a.length, offset = begin % a.length;
    int64_t count = kPiece - offset % kPiece;  // pieces begin where those of the noise do
    if (count > a.length - offset) count = a.length - offset;
    if (count > end - begin) count = end - begin;
    Piece<T> p(begin, count, image);
    const T* m = static_cast<const T*>(a.model_out);
    if (!a.has_variance) {
      p.m = m + begin;
      if (a.guided) p.conditional = p.m + a.total;
    } else {
      const T* first = m + 2 * image * a.length;
      const T* second = a.guided ? first + 2 * a.total : first;
      if (!a.interleaved) {
        p.m = first + offset;
        if (a.guided) p.conditional = second + offset;
        if (a.learned) p.v = second + a.length + offset;
      } else {
        gather(first, a.channels, offset, count, to.m);
        p.m = to.m;
        if (a.guided) {
          gather(second, a.channels, offset, count, to.conditional);
          p.conditional = to.conditional;
        }
        if (a.learned) {
          gather(second + a.channels, a.channels, offset, count, to.v);
          p.v = to.v;
        }
      }
    }
    body(p);
    begin += count;
  }
}

template <class T>
struct Row {
  using X = Values<T>;
  using V = typename Lanes<T>::V;
  V guidance, x0_x, x0_m, low, high, out_x, out_x0, out_m, noise;
  V logvar, logvar_v;  // halved, and as powers of 2
  V amount;            // of noise, where the variance is not learned
  V keep_x, keep_x0, keep_m, keep_noise;
  bool noisy, keep_noisy;

  static V fill(double value) { return fill_lanes<V>(static_cast<typename Lanes<T>::Wide>(value)); }

  explicit Row(const double* c)
      : guidance(fill(c[kGuidance])),
        x0_x(fill(c[kX0X])),
        x0_m(fill(c[kX0M])),
        low(fill(c[kClipMin])),
        high(fill(c[kClipMax])),
        out_x(fill(c[kOutX])),
        out_x0(fill(c[kOutX0])),
        out_m(fill(c[kOutM])),
        noise(fill(c[kNoise])),
        logvar(fill(c[kLogvar] / 2 * kLog2e)),
        logvar_v(fill(c[kLogvarV] / 2 * kLog2e)),
        amount(fill(c[kNoise] * std::exp(c[kLogvar] / 2))),
        keep_x(fill(c[kKeepX])),
        keep_x0(fill(c[kKeepX0])),
        keep_m(fill(c[kKeepM])),
        keep_noise(fill(c[kKeepNoise])),
        noisy(c[kNoise] != 0),
        keep_noisy(c[kKeepNoise] != 0) {}

  FASTDIFF_INLINE X guided(const X& m, const X& conditional) const {
    return fmadd(guidance, conditional - m, m);
  }

  FASTDIFF_INLINE X free_x0(const X& x, const X& m) const { return fmadd(x0_x, x, x0_m * m); }
};

// m of some elements of a piece, guided and rescaled.
template <class T>
FASTDIFF_INLINE Values<T> model(const Row<T>& row, const Piece<T>& p, const double* rescale,
                                int64_t i, int64_t count) {
  using X = Values<T>;
  X m = X::load(p.m + i, count);
  if (p.conditional) {
    m = row.guided(m, X::load(p.conditional + i, count));
    if (rescale) m = m * Row<T>::fill(rescale[p.image]);
  }
  return m;
}

// kTogether Values of a piece from element i on, the last with `count` elements. kLinear is for
// rows without x0.
template <class T, int kTogether, bool kLinear>
FASTDIFF_INLINE void step(const SamplerStepArgs& a, const Row<T>& row, const Piece<T>& p,
                          const typename Lanes<T>::Wide* z_wide, int64_t i, int64_t count) {
  using X = Values<T>;
  using V = typename Lanes<T>::V;
  using Wide = typename Lanes<T>::Wide;
  constexpr int64_t size = Lanes<T>::size;
  const T* px = static_cast<const T*>(a.x) + p.begin + i;
  const T* pz = static_cast<const T*>(a.noise);
  T* out = static_cast<T*>(a.out) + p.begin + i;

  X x[kTogether], m[kTogether], x0[kTogether], y[kTogether], z[kTogether];
  for (int b = 0; b < kTogether; ++b) {
    x[b] = X::load(px + b * size, count);
    m[b] = model(row, p, a.rescale, i + b * size, count);
  }
  if constexpr (!kLinear)
    for (int b = 0; b < kTogether; ++b) x0[b] = row.free_x0(x[b], m[b]);
  if constexpr (kLinear) {
  } else if (a.limit) {
    const V high = Row<T>::fill(a.limit[p.image]), low = -high;
    for (int b = 0; b < kTogether; ++b) {
      const X bounded = X::each(
          [&](const V& value) FASTDIFF_HOT {  // NaN where value, low or high is NaN
            return from_torch<V>(
                at::vec::minimum(at::vec::maximum(to_torch(value), to_torch(low)), to_torch(high)));
          },
          x0[b]);
      x0[b] = bounded / high;
    }
  } else {
    for (int b = 0; b < kTogether; ++b)
      x0[b] = X::each([&](const V& value)
                          FASTDIFF_HOT { return at_most(at_least(value, row.low), row.high); },
                      x0[b]);
  }
  for (int b = 0; b < kTogether; ++b) {
    y[b] = row.out_m * m[b];
    if constexpr (!kLinear) y[b] = fmadd(row.out_x0, x0[b], y[b]);
    y[b] = fmadd(row.out_x, x[b], y[b]);
  }
  for (int j = 0; j < a.reads; ++j) {
    const Wide* slot = static_cast<const Wide*>(a.read[j]) + p.begin + i;
    const V factor = Row<T>::fill(a.factor[j]);
    for (int b = 0; b < kTogether; ++b)
      y[b] = fmadd(factor, X::load_wide(slot + b * size, count), y[b]);
  }
  const bool noise = pz || z_wide;
  if (noise) {
    for (int b = 0; b < kTogether; ++b)
      z[b] = pz ? X::load(pz + p.begin + i + b * size, count)
                : X::load_wide(z_wide + i + b * size, count);
    if (p.v) {
      for (int b = 0; b < kTogether; ++b) {
        const X v = X::load(p.v + i + b * size, count);
        const X deviation = exp2_values<T>(fmadd(row.logvar_v, v, row.logvar));
        y[b] = fmadd(row.noise * deviation, z[b], y[b]);
      }
    } else if (row.noisy) {
      for (int b = 0; b < kTogether; ++b) y[b] = fmadd(row.amount, z[b], y[b]);
    }
  }
  if (a.keep) {
    Wide* slot = static_cast<Wide*>(a.keep) + p.begin + i;
    for (int b = 0; b < kTogether; ++b) {
      X kept = row.keep_m * m[b];
      if constexpr (!kLinear) kept = fmadd(row.keep_x0, x0[b], kept);
      kept = fmadd(row.keep_x, x[b], kept);
      if (noise && row.keep_noisy) kept = fmadd(row.keep_noise, z[b], kept);
      kept.store_wide(slot + b * size, count);
    }
  }
  for (int b = 0; b < kTogether; ++b) y[b].store(out + b * size, count);
}

template <class T, bool kLinear>
void elements(const SamplerStepArgs& a, int64_t begin, int64_t end) {
  using Wide = typename Lanes<T>::Wide;
  constexpr int64_t size = Lanes<T>::size;
  constexpr int kTogether = 4 / Lanes<T>::vectors;
  const Row<T> row(a.row);
  Wide buffer[kPiece + 2 * kPhiloxValues];
  Apart<T> apart;
  for_pieces<T>(a, begin, end, apart, [&](const Piece<T>& p) {
    const Wide* z = nullptr;
    if (a.seed) {
      z = PhiloxStream(a.seed + 2 * p.image, a.step)
              .fill(p.begin - p.image * a.length, p.count, buffer);
    } else if (a.wide_noise) {
      z = static_cast<const Wide*>(a.wide_noise) + p.begin;
    }
    int64_t i = 0;
    for (; i + kTogether * size <= p.count; i += kTogether * size)
      step<T, kTogether, kLinear>(a, row, p, z, i, size);
    for (; i + size <= p.count; i += size) step<T, 1, kLinear>(a, row, p, z, i, size);
    if (i < p.count) step<T, 1, kLinear>(a, row, p, z, i, p.count - i);
  });
}

// The factor by which an image's guided m is rescaled. Deviations are taken in two passes over m
// less its first value: a large mean then costs no digits, and a constant image has a deviation of
// exactly 0. A piece is summed in vectors, the sums of pieces in float64.
template <class T>
double rescale_factor(const SamplerStepArgs& a, int64_t image) {
  using X = Values<T>;
  using V = typename Lanes<T>::V;
  using Wide = typename Lanes<T>::Wide;
  const Row<T> row(a.row);
  Apart<T> apart;
  const int64_t begin = image * a.length, end = begin + a.length;
  Wide origin[2] = {};  // the first m_c, and the first m
  double mean[2] = {};  // of what remains
  double square[2] = {};
  for (int pass = 0; pass < 2; ++pass) {
    double total[2] = {};
    for_pieces<T>(a, begin, end, apart, [&](const Piece<T>& p) {
      if (pass == 0 && p.begin == begin) {
        Wide first[Lanes<T>::size];
        X::load(p.conditional, 1).store_wide(first);
        origin[0] = first[0];
        model<T>(row, p, nullptr, 0, 1).store_wide(first);
        origin[1] = first[0];
      }
      V sum[2] = {};
      for_values<T>(p.count, [&](int64_t i, int64_t count) FASTDIFF_HOT {
        X value[2] = {X::load(p.conditional + i, count), model<T>(row, p, nullptr, i, count)};
        for (int which = 0; which < 2; ++which) {
          X& from_mean = value[which];
          from_mean = from_mean - X(origin[which]) - X(static_cast<Wide>(mean[which]));
          if (pass == 1) from_mean = from_mean * from_mean;
          from_mean.keep(count);
          for (const V& vector : from_mean.vector) sum[which] += vector;
        }
      });
      for (int which = 0; which < 2; ++which) total[which] += sum_lanes(sum[which]);
    });
    for (int which = 0; which < 2; ++which)
      (pass == 0 ? mean : square)[which] = total[which] / static_cast<double>(a.length);
  }
  const double ratio = square[1] == 0 ? 1 : std::sqrt(square[0] / square[1]);
  return 1 - a.row[kRescale] + a.row[kRescale] * ratio;
}

template <class T>
void magnitudes(const SamplerStepArgs& a, int64_t image, void* out) {
  using X = Values<T>;
  using V = typename Lanes<T>::V;
  const Row<T> row(a.row);
  Apart<T> apart;
  const int64_t begin = image * a.length;
  for_pieces<T>(a, begin, begin + a.length, apart, [&](const Piece<T>& p) {
    const T* x = static_cast<const T*>(a.x) + p.begin;
    auto* to = static_cast<typename Lanes<T>::Wide*>(out) + p.begin - begin;
    for_values<T>(p.count, [&](int64_t i, int64_t count) FASTDIFF_HOT {
      const X x0 = row.free_x0(X::load(x + i, count), model<T>(row, p, a.rescale, i, count));
      X::each([](const V& value) FASTDIFF_HOT { return from_torch<V>(to_torch(value).abs()); }, x0)
          .store_wide(to + i, count);
    });
  });
}

}  // namespace

void sampler_step(const SamplerStepArgs& a, int64_t begin, int64_t end) {
  const bool linear = a.row[kOutX0] == 0 && a.row[kKeepX0] == 0;
  for_floating(a.dtype, [&]<class T>() {
    linear ? elements<T, true>(a, begin, end) : elements<T, false>(a, begin, end);
  });
}

void sampler_step_rescale(const SamplerStepArgs& a, int64_t image, double* factor) {
  for_floating(a.dtype, [&]<class T>() { *factor = rescale_factor<T>(a, image); });
}

void sampler_step_magnitudes(const SamplerStepArgs& a, int64_t image, void* out) {
  for_floating(a.dtype, [&]<class T>() { magnitudes<T>(a, image, out); });
}

}  // namespace fastdiff::CPU_CAPABILITY
