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
#include "cpu/kernels/group_norm_unit.h"

namespace fastdiff::CPU_CAPABILITY {

// silu'(u) = s + u s (1 - s) with s = 1 / (1 + e^-u).
template <class T, bool kSilu, class V>
FASTDIFF_INLINE V before_silu(const V& grad, const V& centered, const V& gain, const V& offset) {
  if constexpr (!kSilu) return grad;
  const V u = at::vec::fmadd(centered, gain, offset);
  const V s = quotient<T>(V(1), V(1) + exp2_of<Lanes<T>::digits>(u * V(-kLog2e)));
  return grad * at::vec::fmadd(u * s, V(1) - s, s);
}

// What the first pass adds up for a vector of elements.
template <class V>
struct Sums {
  V du = V(0), du_x = V(0), x = V(0);
};

// Per-channel sums of the first pass over the pixels, and the coefficients of the second:
// dx = du slope + (x - center) curve + base.
template <class T>
struct Plan {
  using Wide = typename Lanes<T>::Wide;
  double *du, *du_x, *x;
  Wide *slope, *curve, *base;

  Plan(const Unit<T>& u, Scratch& scratch)
      : du(scratch.take<double>(u.padded())),
        du_x(scratch.take<double>(u.padded())),
        x(scratch.take<double>(u.padded())),
        slope(scratch.take<Wide>(u.padded())),
        curve(scratch.take<Wide>(u.padded())),
        base(scratch.take<Wide>(u.padded())) {
    for (int64_t i = 0; i < u.width; ++i) du[i] = 0, du_x[i] = 0, x[i] = 0;
  }
};

template <class T, bool kSilu>
static void sum_first(const Unit<T>& u, const T* grad, T* dx, const Affine<T>& f, Plan<T>& plan) {
  using B = Block<T>;
  using V = typename Lanes<T>::V;
  constexpr int parts = Lanes<T>::parts;
  const T* x = u.at(u.a.x);
  const int64_t pixels = u.a.pixels;
  for (int64_t c = 0; c < u.width; ++c) {
    const V center(f.center[c]), gain(f.gain[c]), offset(f.offset[c]);
    for (int64_t p = 0; p < pixels; p += kBlockRun) {
      const int64_t n = pixels - p < kBlockRun ? pixels - p : kBlockRun, o = c * u.stride + p;
      Sums<V> sums[parts];
      for_blocks<T>(n, [&](int64_t i, int64_t count) FASTDIFF_HOT {
        B a = B::load(x + o + i, count);
        const B g = B::load(grad + o + i, count);
        for (int r = 0; r < parts; ++r) a.part[r] = a.part[r] - center;
        a.keep(count);  // past the end grad is zero and so is du, but x - center is not
        B v;
        for (int r = 0; r < parts; ++r) {
          const V d = a.part[r];
          v.part[r] = before_silu<T, kSilu>(g.part[r], d, gain, offset);
          sums[r].du = sums[r].du + v.part[r];
          sums[r].du_x = at::vec::fmadd(v.part[r], d, sums[r].du_x);
          sums[r].x = sums[r].x + d;
        }
        if constexpr (kSilu) v.store(dx + o + i, count);
      });
      for (int r = 0; r < parts; ++r) {
        plan.du[c] += sum_lanes(sums[r].du);
        plan.du_x[c] += sum_lanes(sums[r].du_x);
        plan.x[c] += sum_lanes(sums[r].x);
      }
    }
  }
}

// A block of rows is summed in the wide type, two rows at a time to halve the traffic of the sums
// with the first-level cache. The second pass's coefficients lend their place to these sums.
template <class T, bool kSilu>
static void sum_last(const Unit<T>& u, const T* grad, T* dx, const Affine<T>& f, Plan<T>& plan) {
  using B = Block<T>;
  using V = typename Lanes<T>::V;
  using Wide = typename Lanes<T>::Wide;
  const T* x = u.at(u.a.x);
  Wide *sum_du = plan.slope, *sum_du_x = plan.curve, *sum_x = plan.base;
  for (int64_t begin = 0; begin < u.a.pixels; begin += kBlockRows) {
    const int64_t end = u.a.pixels - begin < kBlockRows ? u.a.pixels : begin + kBlockRows;
    for (int64_t i = 0; i < u.padded(); ++i) sum_du[i] = 0, sum_du_x[i] = 0, sum_x[i] = 0;
    for (int64_t p = begin; p < end; p += 2) {
      const int64_t o = p * u.stride, rows = end - p < 2 ? 1 : 2;
      for_blocks<T>(u.width, [&](int64_t i, int64_t count) FASTDIFF_HOT {
        B du = B::load_wide(sum_du + i), du_x = B::load_wide(sum_du_x + i),
          all = B::load_wide(sum_x + i);
        for (int64_t row = 0; row < rows; ++row) {
          const int64_t at = o + row * u.stride + i;
          const B a = B::load(x + at, count), g = B::load(grad + at, count);
          B v;
          for (int r = 0; r < Lanes<T>::parts; ++r) {
            const int64_t c = i + r * V::size();
            const V d = a.part[r] - V::loadu(f.center + c);
            v.part[r] =
                before_silu<T, kSilu>(g.part[r], d, V::loadu(f.gain + c), V::loadu(f.offset + c));
            du.part[r] = du.part[r] + v.part[r];
            du_x.part[r] = at::vec::fmadd(v.part[r], d, du_x.part[r]);
            all.part[r] = all.part[r] + d;
          }
          if constexpr (kSilu) v.store(dx + at, count);
        }
        du.store_wide(sum_du + i);
        du_x.store_wide(sum_du_x + i);
        all.store_wide(sum_x + i);
      });
    }
    for (int64_t c = 0; c < u.width; ++c) {
      plan.du[c] += sum_du[c];
      plan.du_x[c] += sum_du_x[c];
      plan.x[c] += sum_x[c];
    }
  }
}

// From the sums to the per-channel gradients and the coefficients of the second pass.
template <class T>
static void solve(const Unit<T>& u, const GroupNormSiluBackward& b, const Affine<T>& f,
                  Plan<T>& plan) {
  const double *mean = u.statistics(u.a.mean), *rstd = u.statistics(u.a.rstd);
  auto *sum_du = u.per_channel(b.sum_du), *sum_du_h = u.per_channel(b.sum_du_h),
       *sum_dx = u.per_channel(b.sum_dx);
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
      sum_dx[c] = plan.du[c] * slope + plan.x[c] * curve + pixels * base;
      plan.slope[c] = slope;
      plan.curve[c] = curve;
      plan.base[c] = base;
    }
  }
}

// dx from du, which may lie where dx will.
template <class T>
static void write(const Unit<T>& u, const T* du, T* dx, const Affine<T>& f, const Plan<T>& plan) {
  using B = Block<T>;
  using V = typename Lanes<T>::V;
  const T* x = u.at(u.a.x);
  const auto apply = [&](int64_t o, int64_t length, auto&& coefficient) FASTDIFF_HOT {
    for_blocks<T>(length, [&](int64_t i, int64_t count) FASTDIFF_HOT {
      B a = B::load(x + o + i, count);
      const B v = B::load(du + o + i, count);
      for (int r = 0; r < Lanes<T>::parts; ++r) {
        const int64_t c = i + r * V::size();
        const V curved = at::vec::fmadd(a.part[r] - coefficient(f.center, c),
                                        coefficient(plan.curve, c), coefficient(plan.base, c));
        a.part[r] = at::vec::fmadd(v.part[r], coefficient(plan.slope, c), curved);
      }
      a.store(dx + o + i, count);
    });
  };
  if (u.a.channels_last) {
    for (int64_t p = 0; p < u.a.pixels; ++p)
      apply(p * u.stride, u.width,
            [](const auto* array, int64_t c) FASTDIFF_HOT { return V::loadu(array + c); });
  } else {
    for (int64_t c = 0; c < u.width; ++c)
      apply(c * u.stride, u.a.pixels,
            [c](const auto* array, int64_t) FASTDIFF_HOT { return V(array[c]); });
  }
}

template <class T, bool kSilu>
static void run(const GroupNormSiluBackward& b, int64_t begin, int64_t end, void* memory) {
  for (int64_t index = begin; index < end; ++index) {
    Scratch scratch{static_cast<char*>(memory)};
    const Unit<T> u(b.forward, index);
    const Affine<T> f(u, 1, scratch);
    Plan<T> plan(u, scratch);
    const T* grad = u.at(b.grad);
    T* dx = u.at(b.dx);
    if (u.a.channels_last) {
      sum_last<T, kSilu>(u, grad, dx, f, plan);
    } else {
      sum_first<T, kSilu>(u, grad, dx, f, plan);
    }
    solve(u, b, f, plan);
    write(u, kSilu ? dx : grad, dx, f, plan);
  }
}

void group_norm_silu_backward(const GroupNormSiluBackward& b, int64_t begin, int64_t end,
                              void* scratch) {
  for_dtype(b.forward.dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    b.forward.silu ? run<T, true>(b, begin, end, scratch) : run<T, false>(b, begin, end, scratch);
  });
}

}  // namespace fastdiff::CPU_CAPABILITY
