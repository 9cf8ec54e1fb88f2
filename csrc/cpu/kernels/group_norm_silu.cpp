// y = silu(GroupNorm(x + add) (1 + scale) + shift) + residual, one unit of groups at a time.
//
// Reads x once from memory and writes y: 2 S for an activation of S bytes (3 S with a residual),
// where a unit fits the second-level cache; the launcher chooses units that do. PyTorch's
// group_norm and silu move 4 S.
//
// Statistics are taken in one pass as sums of x - pivot and of its square, block by block, and the
// blocks merged with Chan's formula (Chan et al. 1983, "Algorithms for computing the sample
// variance", eq. 2.1) in double. The pivot is the mean of what came before (at first, of the first
// few elements), so that its distance from the block's mean is part of the variance and nothing is
// cancelled that matters: with k elements behind the pivot and K in all, (pivot - mean)^2 <= K / k
// variances. Channels-last it goes channel by channel and the channels of a group are merged last.
#include "cpu/kernels/group_norm_unit.h"

namespace fastdiff::CPU_CAPABILITY {

constexpr int64_t kPivot = 16;  // elements, or rows, whose mean is the first pivot

// Vectors of columns that are summed at a time, two sums each: as many as the registers hold.
#ifdef CPU_CAPABILITY_AVX512
constexpr int kColumns = 8;
#else
constexpr int kColumns = 4;
#endif

struct Moments {
  double count = 0, mean = 0, m2 = 0;  // m2: sum of squares about the mean

  void merge(double n, double other_mean, double other_m2) {
    const double delta = other_mean - mean, total = count + n;
    mean += delta * n / total;
    m2 += other_m2 + delta * delta * count * n / total;
    count = total;
  }

  // n elements with the given sums of x - pivot and (x - pivot)^2.
  void merge_sums(double n, double pivot, double sum, double squares) {
    const double rest = squares - sum * sum / n;
    merge(n, pivot + sum / n, rest > 0 ? rest : 0);
  }

  double rstd(double eps) const { return 1 / std::sqrt(m2 / count + eps); }
};

// Sums of x - pivot and its square over n elements, in four chains.
template <class T>
static void sum_run(const T* x, int64_t n, typename Lanes<T>::Wide pivot, double& sum,
                    double& squares) {
  using B = Block<T>;
  using V = typename Lanes<T>::V;
  constexpr int64_t size = Lanes<T>::size, parts = Lanes<T>::parts, blocks = 4 / parts;
  const V shift(pivot);
  V s[4] = {V(0), V(0), V(0), V(0)}, q[4] = {V(0), V(0), V(0), V(0)};
  const auto add = [&](const B& b, int first) FASTDIFF_HOT {
    for (int r = 0; r < parts; ++r) {
      s[first + r] = s[first + r] + b.part[r];
      q[first + r] = at::vec::fmadd(b.part[r], b.part[r], q[first + r]);
    }
  };
  const auto load = [&](int64_t i, int64_t count) FASTDIFF_HOT {
    B b = B::load(x + i, count);
    for (int r = 0; r < parts; ++r) b.part[r] = b.part[r] - shift;
    return b;
  };
  int64_t i = 0;
  for (; i + blocks * size <= n; i += blocks * size)
    for (int64_t k = 0; k < blocks; ++k) add(load(i + k * size, size), k * parts);
  for_blocks<T>(n - i, [&](int64_t k, int64_t count) FASTDIFF_HOT {
    B b = load(i + k, count);
    b.keep(count);
    add(b, 0);
  });
  sum = sum_lanes((s[0] + s[1]) + (s[2] + s[3]));
  squares = sum_lanes((q[0] + q[1]) + (q[2] + q[3]));
}

template <class T>
static Moments moments_of_run(const T* x, int64_t length) {
  using Wide = typename Lanes<T>::Wide;
  double sum, squares;
  const int64_t few = length < kPivot ? length : kPivot;
  sum_run(x, few, Wide(0), sum, squares);
  Wide pivot = sum / few;
  Moments m;
  for (int64_t i = 0; i < length; i += kBlockRun) {
    const int64_t n = length - i < kBlockRun ? length - i : kBlockRun;
    sum_run(x + i, n, pivot, sum, squares);
    m.merge_sums(n, pivot, sum, squares);
    pivot = m.mean;
  }
  return m;
}

// Channels-first: a group's pixels lie together, so without `add` they are one run.
template <class T>
static void statistics_first(const Unit<T>& u) {
  const int64_t runs = u.a.add ? u.per_group : 1;
  const int64_t length = u.a.pixels * u.per_group / runs;
  double *mean = u.statistics(u.a.mean), *rstd = u.statistics(u.a.rstd);
  for (int64_t g = 0; g < u.groups; ++g) {
    Moments m;
    for (int64_t c = 0; c < runs; ++c) {
      const int64_t channel = g * u.per_group + c;
      const Moments run = moments_of_run(u.at(u.a.x) + channel * u.stride, length);
      m.merge(run.count, run.mean + u.of_image(u.a.add, channel, 0), run.m2);
    }
    mean[g] = m.mean;
    rstd[g] = m.rstd(u.a.eps);
  }
}

// Sums of x - pivot and its square down kBlocks blocks of columns; `count` columns in the last.
template <class T, int kBlocks>
FASTDIFF_INLINE void sum_columns(const T* x, int64_t rows, int64_t stride, int64_t count,
                                 const typename Lanes<T>::Wide* pivot, typename Lanes<T>::Wide* sum,
                                 typename Lanes<T>::Wide* squares) {
  using B = Block<T>;
  constexpr int64_t size = Lanes<T>::size;
  B p[kBlocks], s[kBlocks], q[kBlocks];
  for (int k = 0; k < kBlocks; ++k) {
    p[k] = B::load_wide(pivot + k * size);
    s[k] = q[k] = B::fill(0);
  }
  for (int64_t row = 0; row < rows; ++row)
    for (int k = 0; k < kBlocks; ++k) {
      const B b = B::load(x + row * stride + k * size, k + 1 < kBlocks ? size : count);
      for (int r = 0; r < Lanes<T>::parts; ++r) {
        const auto d = b.part[r] - p[k].part[r];
        s[k].part[r] = s[k].part[r] + d;
        q[k].part[r] = at::vec::fmadd(d, d, q[k].part[r]);
      }
    }
  for (int k = 0; k < kBlocks; ++k) {
    s[k].store_wide(sum + k * size);
    q[k].store_wide(squares + k * size);
  }
}

template <class T>
static void sum_rows(const T* x, int64_t rows, int64_t stride, int64_t width,
                     const typename Lanes<T>::Wide* pivot, typename Lanes<T>::Wide* sum,
                     typename Lanes<T>::Wide* squares) {
  constexpr int64_t size = Lanes<T>::size;
  constexpr int kBlocks = kColumns / Lanes<T>::parts;
  int64_t i = 0;
  for (; i + kBlocks * size <= width; i += kBlocks * size)
    sum_columns<T, kBlocks>(x + i, rows, stride, size, pivot + i, sum + i, squares + i);
  for_blocks<T>(width - i, [&](int64_t k, int64_t count) FASTDIFF_HOT {
    sum_columns<T, 1>(x + i + k, rows, stride, count, pivot + i + k, sum + i + k, squares + i + k);
  });
}

template <class T>
static void statistics_last(const Unit<T>& u, Scratch scratch) {
  using Wide = typename Lanes<T>::Wide;
  const int64_t padded = u.padded(), pixels = u.a.pixels;
  auto *mean = scratch.take<double>(padded), *m2 = scratch.take<double>(padded);
  auto *pivot = scratch.take<Wide>(padded), *sum = scratch.take<Wide>(padded),
       *squares = scratch.take<Wide>(padded);
  const T* x = u.at(u.a.x);
  for (int64_t i = 0; i < padded; ++i) pivot[i] = 0, sum[i] = 0, mean[i] = 0, m2[i] = 0;
  const int64_t few = pixels < kPivot ? pixels : kPivot;
  sum_rows(x, few, u.stride, u.width, pivot, sum, squares);
  for (int64_t i = 0; i < u.width; ++i) pivot[i] = sum[i] / few;
  for (int64_t p = 0; p < pixels; p += kBlockRows) {
    const int64_t rows = pixels - p < kBlockRows ? pixels - p : kBlockRows;
    sum_rows(x + p * u.stride, rows, u.stride, u.width, pivot, sum, squares);
    const double inverse = 1.0 / rows, share = double(rows) / (p + rows), weight = p * share;
    for (int64_t i = 0; i < u.width; ++i) {  // Moments::merge_sums, for all columns
      const double s = sum[i], rest = squares[i] - s * s * inverse;
      const double delta = pivot[i] + s * inverse - mean[i];
      mean[i] += delta * share;
      m2[i] += (rest > 0 ? rest : 0) + delta * delta * weight;
      pivot[i] = mean[i];
    }
  }
  double *group_mean = u.statistics(u.a.mean), *rstd = u.statistics(u.a.rstd);
  for (int64_t g = 0; g < u.groups; ++g) {
    Moments m;
    for (int64_t c = g * u.per_group; c < (g + 1) * u.per_group; ++c)
      m.merge(pixels, mean[c] + u.of_image(u.a.add, c, 0), m2[c]);
    group_mean[g] = m.mean;
    rstd[g] = m.rstd(u.a.eps);
  }
}

// With SiLU gain and offset carry the factor -log2 e, so that t = -u log2 e comes out, and
// silu(u) = u / (1 + e^-u) = t / (-log2 e 2^t - log2 e).
template <class T, bool kSilu, class V>
FASTDIFF_INLINE V activate(const V& x, const V& center, const V& gain, const V& offset) {
  const V t = at::vec::fmadd(x - center, gain, offset);
  if constexpr (!kSilu) return t;
  const V factor(-kLog2e);
  return quotient<T>(t, at::vec::fmadd(exp2_of<Lanes<T>::digits>(t), factor, factor));
}

// `length` elements, coefficient(block index) giving a channel's for each.
template <class T, bool kSilu, bool kResidual, class Coefficient>
FASTDIFF_INLINE void apply_run(const T* x, const T* residual, T* out, int64_t length,
                               Coefficient&& coefficient) {
  using B = Block<T>;
  for_blocks<T>(length, [&](int64_t i, int64_t count) FASTDIFF_HOT {
    B v = B::load(x + i, count);
    B add;
    if constexpr (kResidual) add = B::load(residual + i, count);
    for (int r = 0; r < Lanes<T>::parts; ++r) {
      const auto [center, gain, offset] = coefficient(i, r);
      v.part[r] = activate<T, kSilu>(v.part[r], center, gain, offset);
      if constexpr (kResidual) v.part[r] = v.part[r] + add.part[r];
    }
    v.store(out + i, count);
  });
}

template <class V>
struct Coefficients {
  V center, gain, offset;
};

template <class T, bool kSilu, bool kResidual>
static void apply(const Unit<T>& u, const Affine<T>& f) {
  using V = typename Lanes<T>::V;
  const T* x = u.at(u.a.x);
  const T* residual = kResidual ? u.at(u.a.residual) : nullptr;
  T* out = u.at(u.a.out);
  const int64_t runs = u.a.channels_last ? u.a.pixels : u.width;
  for (int64_t run = 0; run < runs; ++run) {
    const int64_t o = run * u.stride;
    const T* res = kResidual ? residual + o : nullptr;
    if (u.a.channels_last) {
      apply_run<T, kSilu, kResidual>(
          x + o, res, out + o, u.width, [&](int64_t i, int r) FASTDIFF_HOT {
            const int64_t c = i + r * V::size();
            return Coefficients<V>{V::loadu(f.center + c), V::loadu(f.gain + c),
                                   V::loadu(f.offset + c)};
          });
    } else {
      const Coefficients<V> c{V(f.center[run]), V(f.gain[run]), V(f.offset[run])};
      apply_run<T, kSilu, kResidual>(x + o, res, out + o, u.a.pixels,
                                     [&](int64_t, int) FASTDIFF_HOT { return c; });
    }
  }
}

template <class T>
static void run(const GroupNormSilu& a, int64_t begin, int64_t end, void* memory) {
  for (int64_t index = begin; index < end; ++index) {
    Scratch scratch{static_cast<char*>(memory)};
    const Unit<T> u(a, index);
    if (a.channels_last) {
      statistics_last(u, scratch);
    } else {
      statistics_first(u);
    }
    const Affine<T> f(u, a.silu ? -kLog2e : 1, scratch);
    if (a.silu) {
      a.residual ? apply<T, true, true>(u, f) : apply<T, true, false>(u, f);
    } else {
      a.residual ? apply<T, false, true>(u, f) : apply<T, false, false>(u, f);
    }
  }
}

void group_norm_silu(const GroupNormSilu& a, int64_t begin, int64_t end, void* scratch) {
  for_dtype(a.dtype,
            [&](auto* tag) { run<std::remove_pointer_t<decltype(tag)>>(a, begin, end, scratch); });
}

}  // namespace fastdiff::CPU_CAPABILITY
