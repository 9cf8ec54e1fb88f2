// y = silu(GroupNorm(x + add) (1 + scale) + shift) + residual, one unit of groups at a time.
//
// Reads x once from memory and writes y: 2 S for an activation of S bytes (3 S with a residual),
// where a unit fits the second-level cache; the launcher chooses units that do. PyTorch's
// group_norm and silu move 4 S.
//
// Statistics are taken in one pass: of each few thousand elements the sums of x - pivot and of its
// square, which moments.h joins. The pivot is the mean of the elements before them (at first, of
// the first few), so that its distance from their own mean is part of the variance and no digits
// that matter are cancelled: with k elements behind the pivot and K in all, (pivot - mean)^2 <= K /
// k variances. Channels-last the statistics are each channel's until the channels of a group are
// joined at the end.
#include "cpu/kernels/activations.h"
#include "cpu/kernels/dtypes.h"
#include "cpu/kernels/group_norm_unit.h"
#include "cpu/kernels/moments.h"

namespace fastdiff::CPU_CAPABILITY {
namespace {

constexpr int64_t kPivot = 16;  // elements, or rows, whose mean is the first pivot

// Vectors of columns that are summed at a time, two sums each: as many as the registers hold.
#ifdef CPU_CAPABILITY_AVX512
constexpr int kColumns = 8;
#else
constexpr int kColumns = 4;
#endif

double rstd_of(const Moments& m, double eps) { return 1 / std::sqrt(m.m2 / m.count + eps); }

// Sums of x - pivot and its square over n elements, in four chains.
template <class T>
void sum_run(const T* x, int64_t n, typename Lanes<T>::Wide pivot, double& sum, double& squares) {
  using X = Values<T>;
  constexpr int64_t size = X::size, chains = 4 / X::vectors;
  const X shift(pivot);
  X s[chains], q[chains];
  for (int64_t k = 0; k < chains; ++k) s[k] = q[k] = X(0);
  const auto add = [&](const X& value, int64_t k) FASTDIFF_HOT {
    s[k] = s[k] + value;
    q[k] = fmadd(value, value, q[k]);
  };
  int64_t i = 0;
  for (; i + chains * size <= n; i += chains * size)
    for (int64_t k = 0; k < chains; ++k) add(X::load(x + i + k * size) - shift, k);
  for_values<T>(n - i, [&](int64_t k, int64_t count) FASTDIFF_HOT {
    X value = X::load(x + i + k, count) - shift;
    value.keep(count);
    add(value, 0);
  });
  const auto total = [](const X* chain) FASTDIFF_HOT {
    if constexpr (chains == 4) {
      return sum_lanes((chain[0].vector[0] + chain[1].vector[0]) +
                       (chain[2].vector[0] + chain[3].vector[0]));
    } else {
      return sum_lanes((chain[0].vector[0] + chain[0].vector[1]) +
                       (chain[1].vector[0] + chain[1].vector[1]));
    }
  };
  sum = total(s);
  squares = total(q);
}

template <class T>
Moments moments_of_run(const T* x, int64_t length) {
  using Wide = typename Lanes<T>::Wide;
  double sum, squares;
  const int64_t few = std::min(length, kPivot);
  sum_run(x, few, Wide(0), sum, squares);
  Wide pivot = sum / few;
  Moments m;
  for (int64_t i = 0; i < length; i += kSummedElements) {
    const int64_t n = std::min(length - i, kSummedElements);
    sum_run(x + i, n, pivot, sum, squares);
    m.join_sums(n, pivot, sum, squares);
    pivot = m.mean;
  }
  return m;
}

// Channels-first: a group's pixels lie together, as there is no skip, so without `add` they are one
// run.
template <class T>
void statistics_first(const Unit<T>& u) {
  const int64_t runs = u.a.add ? u.per_group : 1;
  const int64_t length = u.a.pixels * u.per_group / runs;
  const Strip<T> x = u.strip(u.a.x, 0);
  double *mean = u.statistics(u.a.mean), *rstd = u.statistics(u.a.rstd);
  for (int64_t g = 0; g < u.groups; ++g) {
    Moments m;
    for (int64_t c = 0; c < runs; ++c) {
      const int64_t channel = g * u.per_group + c;
      const Moments run = moments_of_run(x.data + channel * x.step, length);
      m.join(run.count, run.mean + u.of_image(u.a.add, channel, 0), run.m2);
    }
    mean[g] = m.mean;
    rstd[g] = rstd_of(m, u.a.eps);
  }
}

// Sums of x - pivot and its square down the rows, of kAcross Values side by side, the last of which
// has `count` columns.
template <class T, int kAcross>
FASTDIFF_INLINE void sum_columns(const T* x, int64_t rows, int64_t stride, int64_t count,
                                 const typename Lanes<T>::Wide* pivot, typename Lanes<T>::Wide* sum,
                                 typename Lanes<T>::Wide* squares) {
  using X = Values<T>;
  X p[kAcross], s[kAcross], q[kAcross];
  for (int k = 0; k < kAcross; ++k) {
    p[k] = X::load_wide(pivot + k * X::size);
    s[k] = q[k] = X(0);
  }
  for (int64_t row = 0; row < rows; ++row)
    for (int k = 0; k < kAcross; ++k) {
      const X d = X::load(x + row * stride + k * X::size, k + 1 < kAcross ? X::size : count) - p[k];
      s[k] = s[k] + d;
      q[k] = fmadd(d, d, q[k]);
    }
  for (int k = 0; k < kAcross; ++k) {
    s[k].store_wide(sum + k * X::size);
    q[k].store_wide(squares + k * X::size);
  }
}

template <class T>
void sum_rows(const T* x, int64_t rows, int64_t stride, int64_t width,
              const typename Lanes<T>::Wide* pivot, typename Lanes<T>::Wide* sum,
              typename Lanes<T>::Wide* squares) {
  constexpr int64_t size = Lanes<T>::size;
  constexpr int kAcross = kColumns / Lanes<T>::vectors;
  int64_t i = 0;
  for (; i + kAcross * size <= width; i += kAcross * size)
    sum_columns<T, kAcross>(x + i, rows, stride, size, pivot + i, sum + i, squares + i);
  for_values<T>(width - i, [&](int64_t k, int64_t count) FASTDIFF_HOT {
    sum_columns<T, 1>(x + i + k, rows, stride, count, pivot + i + k, sum + i + k, squares + i + k);
  });
}

// Channels-last: takes five arrays of u.padded() numbers from `memory`.
template <class T>
void statistics_last(const Unit<T>& u, double* memory) {
  using Wide = typename Lanes<T>::Wide;
  const int64_t padded = u.padded(), pixels = u.a.pixels;
  double *mean = memory, *m2 = mean + padded;
  auto *pivot = reinterpret_cast<Wide*>(m2 + padded), *sum = pivot + padded,
       *squares = sum + padded;
  // Of x before skip: what the last vector of x's channels has beyond them is overwritten.
  const auto sum_pixels = [&](int64_t first, int64_t rows) {
    u.for_inputs([&](const Strip<T>& x, int) {
      sum_rows(x.data + first * x.step, rows, x.step, x.width, pivot + x.first, sum + x.first,
               squares + x.first);
    });
  };
  for (int64_t i = 0; i < padded; ++i) pivot[i] = 0, sum[i] = 0, mean[i] = 0, m2[i] = 0;
  const int64_t few = std::min(pixels, kPivot);
  sum_pixels(0, few);
  for (int64_t i = 0; i < u.width; ++i) pivot[i] = sum[i] / few;
  for (int64_t p = 0; p < pixels; p += kSummedRows) {
    const int64_t rows = std::min(pixels - p, kSummedRows);
    sum_pixels(p, rows);
    const JoinChannels moments(p, rows);
    for (int64_t i = 0; i < u.width; ++i) {
      moments.join_sums(mean[i], m2[i], pivot[i], sum[i], squares[i]);
      pivot[i] = mean[i];
    }
  }
  double *group_mean = u.statistics(u.a.mean), *rstd = u.statistics(u.a.rstd);
  for (int64_t g = 0; g < u.groups; ++g) {
    Moments m;
    for (int64_t c = g * u.per_group; c < (g + 1) * u.per_group; ++c)
      m.join(pixels, mean[c] + u.of_image(u.a.add, c, 0), m2[c]);
    group_mean[g] = m.mean;
    rstd[g] = rstd_of(m, u.a.eps);
  }
}

template <class T>
struct Coefficients {
  Values<T> center, gain, offset;
};

// With SiLU gain and offset carry the factor -log2 e, so that t = -u log2 e comes out, and
// silu(u) = u / (1 + e^-u) = t / (-log2 e 2^t - log2 e).
template <class T, bool kSilu>
FASTDIFF_INLINE Values<T> activate(const Values<T>& x, const Coefficients<T>& c,
                                   const Values<T>* residual) {
  const Values<T> t = fmadd(x - c.center, c.gain, c.offset);
  if constexpr (!kSilu) return residual ? t + *residual : t;
  const Values<T> factor(static_cast<typename Lanes<T>::Wide>(-kLog2e));
  const Values<T> denominator = fmadd(exp2_values(t), factor, factor);
  return residual ? quotient_plus(t, denominator, *residual) : quotient(t, denominator);
}

// A run of `length` elements, of which coefficients(i) are those from element i on.
template <class T, bool kSilu, bool kResidual, class OfElement>
FASTDIFF_INLINE void apply_run(const T* x, const T* residual, T* out, int64_t length,
                               OfElement&& coefficients) {
  using X = Values<T>;
  for_values<T>(length, [&](int64_t i, int64_t count) FASTDIFF_HOT {
    const X value = X::load(x + i, count);
    if constexpr (kResidual) {
      const X add = X::load(residual + i, count);
      activate<T, kSilu>(value, coefficients(i), &add).store(out + i, count);
    } else {
      activate<T, kSilu>(value, coefficients(i), nullptr).store(out + i, count);
    }
  });
}

template <class T, bool kSilu, bool kResidual>
void apply(const Unit<T>& u, const Affine<T>& f) {
  using X = Values<T>;
  const int64_t step = u.a.channels_last ? u.a.channels : u.a.pixels;  // of what is dense
  u.for_inputs([&](const Strip<T>& x, int) {
    const T* residual = kResidual ? u.beside(x, u.a.residual) : nullptr;
    T* out = u.beside(x, u.a.out);
    const int64_t runs = u.a.channels_last ? u.a.pixels : x.width;
    for (int64_t run = 0; run < runs; ++run) {
      const T* from = x.data + run * x.step;
      const T* res = kResidual ? residual + run * step : nullptr;
      T* to = out + run * step;
      if (u.a.channels_last) {
        apply_run<T, kSilu, kResidual>(from, res, to, x.width, [&](int64_t i) FASTDIFF_HOT {
          const int64_t c = x.first + i;
          return Coefficients<T>{X::load_wide(f.center + c), X::load_wide(f.gain + c),
                                 X::load_wide(f.offset + c)};
        });
      } else {
        const int64_t i = x.first + run;
        const Coefficients<T> c{X(f.center[i]), X(f.gain[i]), X(f.offset[i])};
        apply_run<T, kSilu, kResidual>(from, res, to, u.a.pixels,
                                       [&](int64_t) FASTDIFF_HOT { return c; });
      }
    }
  });
}

template <class T>
void units(const GroupNormSilu& a, int64_t begin, int64_t end) {
  static thread_local Scratch scratch;
  for (int64_t index = begin; index < end; ++index) {
    const Unit<T> u(a, index);
    double* memory = scratch.at_least<double>(5 * u.padded());
    if (a.channels_last) {
      statistics_last(u, memory);
    } else {
      statistics_first(u);
    }
    const Affine<T> f(u, a.silu ? -kLog2e : 1, memory);
    if (a.silu) {
      a.residual ? apply<T, true, true>(u, f) : apply<T, true, false>(u, f);
    } else {
      a.residual ? apply<T, false, true>(u, f) : apply<T, false, false>(u, f);
    }
  }
}

}  // namespace

void group_norm_silu(const GroupNormSilu& a, int64_t begin, int64_t end) {
  for_floating(a.dtype, [&]<class T>() { units<T>(a, begin, end); });
}

}  // namespace fastdiff::CPU_CAPABILITY
