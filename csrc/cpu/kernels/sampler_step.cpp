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
// Everything is walked flat, whatever the layout, except a model's output with variance channels.
// There m and v of an image follow each other (channels-first), or of each pixel (channels-last):
// of these a piece is copied apart first. What a row needs is asked once for four vectors, which
// costs next to nothing beside a kernel for each of some hundred combinations.
#include "cpu/kernels/sampler_step.h"

#include <cmath>

#include "cpu/kernels/lanes.h"
#include "cpu/kernels/philox.h"

namespace fastdiff::CPU_CAPABILITY {

constexpr int64_t kPiece = 1024;

// Elements begin..begin+count-1, all of one image where images differ.
template <class T>
struct Piece {
  int64_t begin, count, image;
  const T *m, *conditional, *v;  // m_u and m_c with guidance
  FASTDIFF_INLINE Piece(int64_t begin, int64_t count, int64_t image)
      : begin(begin), count(count), image(image), m(nullptr), conditional(nullptr), v(nullptr) {}
};

// Where the model's output is copied apart.
template <class T>
struct Apart {
  T m[kPiece], conditional[kPiece], v[kPiece];
};

// Copies count elements of channels 0..channels-1 of pixels that are 2 channels apart. kChannels is
// their number where it is known, and the loop over them then unrolled, or 0.
template <class T, int64_t kChannels>
static void gather_pixels(const T* pixels, int64_t channels, int64_t begin, int64_t count, T* out) {
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
static void gather(const T* pixels, int64_t channels, int64_t begin, int64_t count, T* out) {
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
FASTDIFF_INLINE Block<T> load_wide(const typename Lanes<T>::Wide* p, int64_t count) {
  using V = typename Lanes<T>::V;
  if (count == Lanes<T>::size) return Block<T>::load_wide(p);
  Block<T> out;
  for (int64_t r = 0; r < Lanes<T>::parts; ++r) {
    const int64_t left = count - r * V::size();
    out.part[r] =
        left <= 0 ? V(0) : V::loadu(p + r * V::size(), left < V::size() ? left : V::size());
  }
  return out;
}

template <class T>
FASTDIFF_INLINE void store_wide(const Block<T>& b, typename Lanes<T>::Wide* p, int64_t count) {
  using V = typename Lanes<T>::V;
  if (count == Lanes<T>::size) return b.store_wide(p);
  for (int64_t r = 0; r < Lanes<T>::parts; ++r) {
    const int64_t left = count - r * V::size();
    if (left > 0) b.part[r].store(p + r * V::size(), left < V::size() ? left : V::size());
  }
}

template <class T>
struct Row {
  using Wide = typename Lanes<T>::Wide;
  using V = typename Lanes<T>::V;
  V guidance, x0_x, x0_m, low, high, out_x, out_x0, out_m, noise;
  V logvar, logvar_v;  // halved, and as powers of 2
  V amount;            // of noise, where the variance is not learned
  V keep_x, keep_x0, keep_m, keep_noise;
  bool noisy, keep_noisy;

  explicit Row(const double* c)
      : guidance(c[kGuidance]),
        x0_x(c[kX0X]),
        x0_m(c[kX0M]),
        low(c[kClipMin]),
        high(c[kClipMax]),
        out_x(c[kOutX]),
        out_x0(c[kOutX0]),
        out_m(c[kOutM]),
        noise(c[kNoise]),
        logvar(c[kLogvar] / 2 * kLog2e),
        logvar_v(c[kLogvarV] / 2 * kLog2e),
        amount(c[kNoise] * std::exp(c[kLogvar] / 2)),
        keep_x(c[kKeepX]),
        keep_x0(c[kKeepX0]),
        keep_m(c[kKeepM]),
        keep_noise(c[kKeepNoise]),
        noisy(c[kNoise] != 0),
        keep_noisy(c[kKeepNoise] != 0) {}

  FASTDIFF_INLINE V guided(const V& m, const V& conditional) const {
    return at::vec::fmadd(guidance, conditional - m, m);
  }

  FASTDIFF_INLINE V free_x0(const V& x, const V& m) const {
    return at::vec::fmadd(x0_x, x, x0_m * m);
  }
};

// m of a block, guided and rescaled.
template <class T>
FASTDIFF_INLINE Block<T> model(const Row<T>& row, const Piece<T>& p, const double* rescale,
                               int64_t i, int64_t count) {
  using V = typename Lanes<T>::V;
  auto m = Block<T>::load(p.m + i, count);
  if (p.conditional) {
    const auto c = Block<T>::load(p.conditional + i, count);
    for (int r = 0; r < Lanes<T>::parts; ++r) m.part[r] = row.guided(m.part[r], c.part[r]);
    if (rescale)
      for (int r = 0; r < Lanes<T>::parts; ++r) m.part[r] = m.part[r] * V(rescale[p.image]);
  }
  return m;
}

// Blocks i..i+kBlocks-1 of a piece, the last of `count` elements.
template <class T, int kBlocks>
FASTDIFF_INLINE void step(const SamplerStepArgs& a, const Row<T>& row, const Piece<T>& p,
                          const typename Lanes<T>::Wide* z_wide, int64_t i, int64_t count) {
  using B = Block<T>;
  using V = typename Lanes<T>::V;
  using Wide = typename Lanes<T>::Wide;
  using at::vec::fmadd;
  constexpr int parts = Lanes<T>::parts;
  constexpr int64_t size = Lanes<T>::size;
  const T* px = static_cast<const T*>(a.x) + p.begin + i;
  const T* pz = static_cast<const T*>(a.noise);
  T* out = static_cast<T*>(a.out) + p.begin + i;

  B x[kBlocks], m[kBlocks], x0[kBlocks], y[kBlocks], z[kBlocks];
  for (int b = 0; b < kBlocks; ++b) {
    x[b] = B::load(px + b * size, count);
    m[b] = model(row, p, a.rescale, i + b * size, count);
  }
  for (int b = 0; b < kBlocks; ++b)
    for (int r = 0; r < parts; ++r) x0[b].part[r] = row.free_x0(x[b].part[r], m[b].part[r]);
  if (a.limit) {
    const V high(a.limit[p.image]), low(-a.limit[p.image]);
    for (int b = 0; b < kBlocks; ++b)
      for (int r = 0; r < parts; ++r) {
        const V bounded = at::vec::minimum(at::vec::maximum(x0[b].part[r], low), high);
        x0[b].part[r] = bounded / high;
      }
  } else {
    for (int b = 0; b < kBlocks; ++b)
      for (int r = 0; r < parts; ++r)  // keeps NaN, in half the instructions of minimum and maximum
        x0[b].part[r] = at::vec::clamp(x0[b].part[r], row.low, row.high);
  }
  for (int b = 0; b < kBlocks; ++b)
    for (int r = 0; r < parts; ++r)
      y[b].part[r] = fmadd(row.out_x, x[b].part[r],
                           fmadd(row.out_x0, x0[b].part[r], row.out_m * m[b].part[r]));
  for (int j = 0; j < a.reads; ++j) {
    const Wide* slot = static_cast<const Wide*>(a.read[j]) + p.begin + i;
    const V factor(a.factor[j]);
    for (int b = 0; b < kBlocks; ++b) {
      const B h = load_wide<T>(slot + b * size, count);
      for (int r = 0; r < parts; ++r) y[b].part[r] = fmadd(factor, h.part[r], y[b].part[r]);
    }
  }
  const bool noise = pz || z_wide;
  if (noise) {
    for (int b = 0; b < kBlocks; ++b)
      z[b] = pz ? B::load(pz + p.begin + i + b * size, count)
                : load_wide<T>(z_wide + i + b * size, count);
    if (p.v) {
      for (int b = 0; b < kBlocks; ++b) {
        const B v = B::load(p.v + i + b * size, count);
        for (int r = 0; r < parts; ++r) {
          const V deviation = exp2_of<Lanes<T>::digits>(fmadd(row.logvar_v, v.part[r], row.logvar));
          y[b].part[r] = fmadd(row.noise * deviation, z[b].part[r], y[b].part[r]);
        }
      }
    } else if (row.noisy) {
      for (int b = 0; b < kBlocks; ++b)
        for (int r = 0; r < parts; ++r)
          y[b].part[r] = fmadd(row.amount, z[b].part[r], y[b].part[r]);
    }
  }
  if (a.keep) {
    Wide* slot = static_cast<Wide*>(a.keep) + p.begin + i;
    for (int b = 0; b < kBlocks; ++b) {
      B kept;
      for (int r = 0; r < parts; ++r) {
        kept.part[r] = fmadd(row.keep_x, x[b].part[r],
                             fmadd(row.keep_x0, x0[b].part[r], row.keep_m * m[b].part[r]));
        if (noise && row.keep_noisy)
          kept.part[r] = fmadd(row.keep_noise, z[b].part[r], kept.part[r]);
      }
      store_wide<T>(kept, slot + b * size, count);
    }
  }
  for (int b = 0; b < kBlocks; ++b) y[b].store(out + b * size, count);
}

template <class T>
static void run(const SamplerStepArgs& a, int64_t begin, int64_t end) {
  using Wide = typename Lanes<T>::Wide;
  constexpr int64_t size = Lanes<T>::size;
  constexpr int kBlocks = 4 / Lanes<T>::parts;
  const Row<T> row(a.row);
  Wide buffer[kPiece + 2 * kPhiloxBlock];
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
    for (; i + kBlocks * size <= p.count; i += kBlocks * size)
      step<T, kBlocks>(a, row, p, z, i, size);
    for (; i + size <= p.count; i += size) step<T, 1>(a, row, p, z, i, size);
    if (i < p.count) step<T, 1>(a, row, p, z, i, p.count - i);
  });
}

void sampler_step(const SamplerStepArgs& a, int64_t begin, int64_t end) {
  for_dtype(a.dtype, [&](auto* tag) { run<std::remove_pointer_t<decltype(tag)>>(a, begin, end); });
}

// Two passes, and everything less the image's first value: a shift costs no digits then, and a
// constant image has a deviation of exactly 0. A piece is summed in vectors, the pieces in double.
template <class T>
static double rescale_factor(const SamplerStepArgs& a, int64_t image) {
  using B = Block<T>;
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
        B::load(p.conditional, 1).store_wide(first);
        origin[0] = first[0];
        model<T>(row, p, nullptr, 0, 1).store_wide(first);
        origin[1] = first[0];
      }
      V sum[2] = {V(0), V(0)};
      for_blocks<T>(p.count, [&](int64_t i, int64_t count) FASTDIFF_HOT {
        B value[2] = {B::load(p.conditional + i, count), model<T>(row, p, nullptr, i, count)};
        for (int which = 0; which < 2; ++which) {
          for (int r = 0; r < Lanes<T>::parts; ++r) {
            auto& part = value[which].part[r];
            part = part - V(origin[which]) - V(static_cast<Wide>(mean[which]));
            if (pass == 1) part = part * part;
          }
          value[which].keep(count);
          for (int r = 0; r < Lanes<T>::parts; ++r) sum[which] = sum[which] + value[which].part[r];
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

void sampler_step_rescale(const SamplerStepArgs& a, int64_t image, double* factor) {
  for_dtype(a.dtype, [&](auto* tag) {
    *factor = rescale_factor<std::remove_pointer_t<decltype(tag)>>(a, image);
  });
}

template <class T>
static void magnitudes(const SamplerStepArgs& a, int64_t image, void* out) {
  using B = Block<T>;
  const Row<T> row(a.row);
  Apart<T> apart;
  const int64_t begin = image * a.length;
  for_pieces<T>(a, begin, begin + a.length, apart, [&](const Piece<T>& p) {
    const T* x = static_cast<const T*>(a.x) + p.begin;
    auto* to = static_cast<typename Lanes<T>::Wide*>(out) + p.begin - begin;
    for_blocks<T>(p.count, [&](int64_t i, int64_t count) FASTDIFF_HOT {
      B b = B::load(x + i, count);
      const B m = model<T>(row, p, a.rescale, i, count);
      for (int r = 0; r < Lanes<T>::parts; ++r) b.part[r] = row.free_x0(b.part[r], m.part[r]).abs();
      store_wide<T>(b, to + i, count);
    });
  });
}

void sampler_step_magnitudes(const SamplerStepArgs& a, int64_t image, void* out) {
  for_dtype(a.dtype,
            [&](auto* tag) { magnitudes<std::remove_pointer_t<decltype(tag)>>(a, image, out); });
}

}  // namespace fastdiff::CPU_CAPABILITY
