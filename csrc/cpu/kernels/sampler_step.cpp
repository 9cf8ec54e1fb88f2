// One row of a sampler's table (fastdiff/samplers/table.py):
//
//   x0 = clamp(x0_x x + x0_m m, low, high)
//   x' = out_x x + out_x0 x0 + out_m m + noise exp((logvar + logvar_v v) / 2) z
//
// Reads x, m, z (and v) once and writes x': 4 L for latents of L bytes, which is the least there
// is. A model with variance channels interleaves m and v (image by image, or channels-last pixel by
// pixel), so x is walked in rows that are contiguous in both.
#include "cpu/kernels/sampler_step.h"

#include <cmath>

#include "cpu/kernels/lanes.h"

namespace fastdiff::CPU_CAPABILITY {

template <class T>
struct Row {
  using Wide = typename Lanes<T>::Wide;
  using V = typename Lanes<T>::V;
  V x0_x, x0_m, low, high, out_x, out_x0, out_m, noise;
  V logvar, logvar_v;  // halved, and as powers of 2
  V amount;            // of noise, where the variance is not learned

  explicit Row(const Wide* c)
      : x0_x(c[0]),
        x0_m(c[1]),
        low(c[2]),
        high(c[3]),
        out_x(c[4]),
        out_x0(c[5]),
        out_m(c[6]),
        noise(c[7]),
        logvar(c[8] / 2 * kLog2e),
        logvar_v(c[9] / 2 * kLog2e),
        amount(c[7] * std::exp(c[8] / 2)) {}

  FASTDIFF_INLINE V mean(const V& x, const V& m) const {
    const V free = at::vec::fmadd(x0_x, x, x0_m * m);
    const V x0 = at::vec::minimum(at::vec::maximum(free, low), high);  // keeps NaN
    return at::vec::fmadd(out_x, x, at::vec::fmadd(out_x0, x0, out_m * m));
  }
};

template <class T, bool kNoise, bool kLearned>
static void run_row(const Row<T>& row, const T* x, const T* m, const T* v, const T* z, T* out,
                    int64_t length) {
  using B = Block<T>;
  for_blocks<T>(length, [&](int64_t i, int64_t count) FASTDIFF_HOT {
    B a = B::load(x + i, count);
    const B b = B::load(m + i, count);
    B c, d;
    if constexpr (kNoise) c = B::load(z + i, count);
    if constexpr (kNoise && kLearned) d = B::load(v + i, count);
    for (int r = 0; r < Lanes<T>::parts; ++r) {
      a.part[r] = row.mean(a.part[r], b.part[r]);
      if constexpr (kNoise && kLearned) {
        const auto deviation =
            exp2_of<Lanes<T>::digits>(at::vec::fmadd(row.logvar_v, d.part[r], row.logvar));
        a.part[r] = at::vec::fmadd(row.noise * deviation, c.part[r], a.part[r]);
      } else if constexpr (kNoise) {
        a.part[r] = at::vec::fmadd(row.amount, c.part[r], a.part[r]);
      }
    }
    a.store(out + i, count);
  });
}

template <class T>
static void run(const SamplerStepArgs& a, int64_t begin, int64_t end) {
  const Row<T> row(static_cast<const typename Lanes<T>::Wide*>(a.row));
  while (begin < end) {
    const int64_t index = begin / a.length, offset = begin % a.length;
    const int64_t length = end - begin < a.length - offset ? end - begin : a.length - offset;
    const T* x = static_cast<const T*>(a.x) + begin;
    const T* m = static_cast<const T*>(a.model_out) + index * a.stride + offset;
    const T* z = static_cast<const T*>(a.noise) + (a.noise ? begin : 0);
    T* out = static_cast<T*>(a.out) + begin;
    if (!a.noise) {
      run_row<T, false, false>(row, x, m, nullptr, nullptr, out, length);
    } else if (a.learned) {
      run_row<T, true, true>(row, x, m, m + a.length, z, out, length);
    } else {
      run_row<T, true, false>(row, x, m, nullptr, z, out, length);
    }
    begin += length;
  }
}

void sampler_step(const SamplerStepArgs& a, int64_t begin, int64_t end) {
  for_dtype(a.dtype, [&](auto* tag) { run<std::remove_pointer_t<decltype(tag)>>(a, begin, end); });
}

}  // namespace fastdiff::CPU_CAPABILITY
