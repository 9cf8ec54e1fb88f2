// Gradients of group_norm_silu, one unit of groups at a time.
//
// With u the value that SiLU s is applied to, h = (x + add - m) r the normalised one,
// G = w (1 + scale) and du = grad s'(u), over a group of K elements:
//
//   dx = r (G du - sum(G du) / K - h sum(G du h) / K)
//
// The first pass sums du, du (x - center) and x - center channel by channel, from which everything
// per channel follows (the weights' gradients as well), and leaves du where dx will be; the second
// turns it into dx. Reads grad and x once from memory and writes dx: 3 S where a unit fits the
// second-level cache, and its exponentials are taken once. PyTorch's two functions move 7 S.
#include "cpu/kernels/activations.h"
#include "cpu/kernels/dtypes.h"
#include "cpu/kernels/group_norm_unit.h"

namespace fastdiff::CPU_CAPABILITY {
namespace {

// How far ahead of the sums memory is asked for: a processor's own guesses end at each page, and
// the exponentials leave it no time to wait (measured: a quarter less time where x is in no cache).
constexpr int64_t kAheadBytes = 4096;

// silu'(u) = s + u s (1 - s) with s = 1 / (1 + e^-u).
template <class T, bool kSilu>
FASTDIFF_INLINE Values<T> before_silu(const Values<T>& grad, const Values<T>& centered,
                                      const Values<T>& gain, const Values<T>& offset) {
  if constexpr (!kSilu) return grad;
  using X = Values<T>;
  const X one(1), u = fmadd(centered, gain, offset);
  const X log2e(static_cast<typename Lanes<T>::Wide>(-kLog2e));
  const X s = quotient(one, one + exp2_values(u * log2e));
  return grad * fmadd(u * s, one - s, s);
}

// Per-channel sums of the first pass over the pixels, and the coefficients of the second:
// dx = du slope + (x - center) curve + base. Takes six arrays of u.padded() numbers from `memory`.
template <class T>
struct Plan {
  using Wide = typename Lanes<T>::Wide;
  double *du, *du_x, *x;
  Wide *slope, *curve, *base;

  Plan(const Unit<T>& u, double* memory)
      : du(memory),
        du_x(du + u.padded()),
        x(du_x + u.padded()),
        slope(reinterpret_cast<Wide*>(x + u.padded())),
        curve(slope + u.padded()),
        base(curve + u.padded()) {
    for (int64_t i = 0; i < u.width; ++i) du[i] = 0, du_x[i] = 0, x[i] = 0;
  }
};

// The channels of a unit that lie in one tensor: strips of the tensors that are read and written.
template <class T>
struct Strips {
  Strip<T> x, grad, dx;
};

// Calls body(strips) for x and for skip.
template <class T, class Body>
void for_strips(const Unit<T>& u, const GroupNormSiluBackward& b, Body&& body) {
  const Strip<T> grad = u.strip(b.grad, 0);
  u.for_inputs([&](const Strip<T>& x, int which) {
    const Strip<T> dx = which == 0 ? u.strip(b.dx, 0) : u.strip(b.dskip, b.dx.channels);
    T* from = grad.data + x.first * (u.a.channels_last ? 1 : u.a.pixels);
    body(Strips<T>{x, {x.first, x.width, from, grad.step}, dx});
  });
}

template <class T, bool kSilu>
void sum_first(const Unit<T>& u, const Strips<T>& s, const Affine<T>& f, Plan<T>& plan) {
  using X = Values<T>;
  const int64_t pixels = u.a.pixels;
  for (int64_t channel = 0; channel < s.x.width; ++channel) {
    const int64_t c = s.x.first + channel;
    const T *x = s.x.data + channel * s.x.step, *grad = s.grad.data + channel * s.grad.step;
    T* dx = s.dx.data + channel * s.dx.step;
    const X center(f.center[c]), gain(f.gain[c]), offset(f.offset[c]);
    for (int64_t o = 0; o < pixels; o += kSummedElements) {
      const int64_t n = std::min(pixels - o, kSummedElements);
      X sum_du(0), sum_du_x(0), sum_x(0);
      for_values<T>(n, [&](int64_t i, int64_t count) FASTDIFF_HOT {
        const X g = X::load(grad + o + i, count);
        X d = X::load(x + o + i, count) - center;
        d.keep(count);  // past the end grad is zero and so is du, but x - center is not
        const X du = before_silu<T, kSilu>(g, d, gain, offset);
        sum_du = sum_du + du;
        sum_du_x = fmadd(du, d, sum_du_x);
        sum_x = sum_x + d;
        if constexpr (kSilu) du.store(dx + o + i, count);
      });
      for (int r = 0; r < X::vectors; ++r) {
        plan.du[c] += sum_lanes(sum_du.vector[r]);
        plan.du_x[c] += sum_lanes(sum_du_x.vector[r]);
        plan.x[c] += sum_lanes(sum_x.vector[r]);
      }
    }
  }
}

// A few rows are summed in the wide type, two rows at a time to halve the traffic of the sums with
// the first-level cache. The second pass's coefficients lend their place to these sums.
template <class T, bool kSilu>
void sum_last(const Unit<T>& u, const Strips<T>& s, const Affine<T>& f, Plan<T>& plan) {
  using X = Values<T>;
  using Wide = typename Lanes<T>::Wide;
  const int64_t first = s.x.first, width = s.x.width;
  const int64_t ahead = std::max<int64_t>(2, kAheadBytes / (width * int64_t{sizeof(T)}));
  Wide *sum_du = plan.slope + first, *sum_du_x = plan.curve + first, *sum_x = plan.base + first;
  for (int64_t begin = 0; begin < u.a.pixels; begin += kSummedRows) {
    const int64_t end = std::min(u.a.pixels, begin + kSummedRows);
    for (int64_t i = 0; i < width; ++i) sum_du[i] = 0, sum_du_x[i] = 0, sum_x[i] = 0;
    for (int64_t p = begin; p < end; p += 2) {
      const T *x = s.x.data + p * s.x.step, *grad = s.grad.data + p * s.grad.step;
      T* dx = s.dx.data + p * s.dx.step;
      const int64_t rows = end - p < 2 ? 1 : 2;
      for_values<T>(width, [&](int64_t i, int64_t count) FASTDIFF_HOT {
        const X center = X::load_wide(f.center + first + i),
                gain = X::load_wide(f.gain + first + i),
                offset = X::load_wide(f.offset + first + i);
        X du = X::load_wide(sum_du + i), du_x = X::load_wide(sum_du_x + i),
          all = X::load_wide(sum_x + i);
        for (int64_t row = 0; row < rows; ++row) {
          __builtin_prefetch(grad + (row + ahead) * s.grad.step + i);
          __builtin_prefetch(x + (row + ahead) * s.x.step + i);
          const X g = X::load(grad + row * s.grad.step + i, count);
          const X d = X::load(x + row * s.x.step + i, count) - center;
          const X v = before_silu<T, kSilu>(g, d, gain, offset);
          du = du + v;
          du_x = fmadd(v, d, du_x);
          all = all + d;
          if constexpr (kSilu) v.store(dx + row * s.dx.step + i, count);
        }
        du.store_wide(sum_du + i, count);
        du_x.store_wide(sum_du_x + i, count);
        all.store_wide(sum_x + i, count);
      });
    }
    for (int64_t c = 0; c < width; ++c) {
      plan.du[first + c] += sum_du[c];
      plan.du_x[first + c] += sum_du_x[c];
      plan.x[first + c] += sum_x[c];
    }
  }
}

// From the sums to the per-channel gradients and the coefficients of the second pass.
template <class T>
void solve(const Unit<T>& u, const GroupNormSiluBackward& b, const Affine<T>& f, Plan<T>& plan) {
  const double *mean = u.statistics(u.a.mean), *rstd = u.statistics(u.a.rstd);
  auto *sum_du = u.per_channel(b.sum_du), *sum_du_h = u.per_channel(b.sum_du_h);
  auto* sum_dx = b.sum_dx ? u.per_channel(b.sum_dx) : nullptr;
  const double pixels = static_cast<double>(u.a.pixels), size = pixels * u.per_group;
  const auto factor = [&](int64_t c) {  // G
    return u.of_channel(u.a.weight, c, 1) * (1 + u.of_image(u.a.scale, c, 0));
  };
  for (int64_t g = 0; g < u.groups; ++g) {
    const int64_t first = g * u.per_group, last = first + u.per_group;
    const double r = rstd[g];
    // h = (x - center) r + rest, where rest is what rounding left out of center.
    const auto rest = [&](int64_t c) {
      return (f.center[c] - (mean[g] - u.of_image(u.a.add, c, 0))) * r;
    };
    double mean_g = 0, mean_gh = 0;  // of G du and G du h over the group
    for (int64_t c = first; c < last; ++c) {
      const double du_h = plan.du_x[c] * r + plan.du[c] * rest(c);
      sum_du[c] = plan.du[c];
      sum_du_h[c] = du_h;
      mean_g += factor(c) * plan.du[c] / size;
      mean_gh += factor(c) * du_h / size;
    }
    for (int64_t c = first; c < last; ++c) {
      const double slope = r * factor(c), curve = -r * r * mean_gh;
      const double base = -r * (mean_g + rest(c) * mean_gh);
      if (sum_dx) sum_dx[c] = plan.du[c] * slope + plan.x[c] * curve + pixels * base;
      plan.slope[c] = slope;
      plan.curve[c] = curve;
      plan.base[c] = base;
    }
  }
}

// dx from du, which the first pass has left where dx will be, or which is grad.
template <class T, bool kSilu>
void write(const Unit<T>& u, const Strips<T>& s, const Affine<T>& f, const Plan<T>& plan) {
  using X = Values<T>;
  const Strip<T>& du = kSilu ? s.dx : s.grad;
  const int64_t runs = u.a.channels_last ? u.a.pixels : s.x.width;
  const auto apply = [&](int64_t run, int64_t length, auto&& coefficient) FASTDIFF_HOT {
    const T *x = s.x.data + run * s.x.step, *from = du.data + run * du.step;
    T* to = s.dx.data + run * s.dx.step;
    for_values<T>(length, [&](int64_t i, int64_t count) FASTDIFF_HOT {
      const X centered = X::load(x + i, count) - coefficient(f.center, i);
      const X curved = fmadd(centered, coefficient(plan.curve, i), coefficient(plan.base, i));
      fmadd(X::load(from + i, count), coefficient(plan.slope, i), curved).store(to + i, count);
    });
  };
  for (int64_t run = 0; run < runs; ++run) {
    if (u.a.channels_last) {
      apply(run, s.x.width, [&](const auto* array, int64_t c) FASTDIFF_HOT {
        return X::load_wide(array + s.x.first + c);
      });
    } else {
      apply(run, u.a.pixels,
            [&](const auto* array, int64_t) FASTDIFF_HOT { return X(array[s.x.first + run]); });
    }
  }
}

template <class T, bool kSilu>
void units(const GroupNormSiluBackward& b, int64_t begin, int64_t end) {
  static thread_local Scratch scratch;
  for (int64_t index = begin; index < end; ++index) {
    const Unit<T> u(b.forward, index);
    double* memory = scratch.at_least<double>(9 * u.padded());
    const Affine<T> f(u, 1, memory);
    Plan<T> plan(u, memory + 3 * u.padded());
    for_strips(u, b, [&](const Strips<T>& s) {
      u.a.channels_last ? sum_last<T, kSilu>(u, s, f, plan) : sum_first<T, kSilu>(u, s, f, plan);
    });
    solve(u, b, f, plan);
    for_strips(u, b, [&](const Strips<T>& s) { write<T, kSilu>(u, s, f, plan); });
  }
}

// A call without a norm has one group, so that a unit is an image.
template <class T>
void images(const GroupNormSiluBackward& b, int64_t begin, int64_t end) {
  using X = Values<T>;
  const X none(0), one(1);
  for (int64_t image = begin; image < end; ++image) {
    const Unit<T> u(b.forward, image);
    for_strips(u, b, [&](const Strips<T>& s) {
      const bool last = u.a.channels_last;
      const int64_t runs = last ? u.a.pixels : s.x.width, length = last ? s.x.width : u.a.pixels;
      for (int64_t run = 0; run < runs; ++run) {
        const T *x = s.x.data + run * s.x.step, *grad = s.grad.data + run * s.grad.step;
        T* dx = s.dx.data + run * s.dx.step;
        for_values<T>(length, [&](int64_t i, int64_t count) FASTDIFF_HOT {
          before_silu<T, true>(X::load(grad + i, count), X::load(x + i, count), one, none)
              .store(dx + i, count);
        });
      }
    });
  }
}

}  // namespace

void group_norm_silu_backward(const GroupNormSiluBackward& b, int64_t begin, int64_t end) {
  for_floating(b.forward.dtype, [&]<class T>() {
    b.forward.silu ? units<T, true>(b, begin, end) : units<T, false>(b, begin, end);
  });
}

void silu_backward(const GroupNormSiluBackward& b, int64_t begin, int64_t end) {
  for_floating(b.forward.dtype, [&]<class T>() { images<T>(b, begin, end); });
}

}  // namespace fastdiff::CPU_CAPABILITY
