// A step of AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2), and in the same pass
// the factor that clips the gradient and the running average of the weights. With g the gradient
// times its factor, m and v its moments, p the parameter and a the average, of step k:
//
//   m += (1 - beta1) (g - m)
//   v = beta2 v + (1 - beta2) g^2
//   p = (1 - lr weight_decay) p - lr / (1 - beta1^k) m / (sqrt(v / (1 - beta2^k)) + eps)
//   a += average_weight (p - a)
//
// Reads 5 S and writes 4 S for parameters of S bytes, the least there is: 9 S. PyTorch's clipping,
// fused step and average, one after another, move 12 S. The order of the arithmetic is that of
// PyTorch's fused step. It is bound by memory: the square root and the two quotients take less time
// than the bytes.
#include "cpu/kernels/adamw_update.h"

#include "cpu/kernels/dtypes.h"
#include "cpu/kernels/lerp.h"

namespace fastdiff::CPU_CAPABILITY {
namespace {

template <class Body>
FASTDIFF_INLINE void for_wide(c10::ScalarType dtype, Body&& body) {
  for_dtype_of<float, double>(dtype, static_cast<Body&&>(body));
}

template <class T>
FASTDIFF_INLINE Values<T> root(const Values<T>& x) {
  using V = typename Lanes<T>::V;
  return Values<T>::each([](const V& v) FASTDIFF_HOT { return from_torch<V>(to_torch(v).sqrt()); },
                         x);
}

template <class T, bool kAverage>
void update(const AdamwUpdate& u, const AdamwTensors& t, int64_t begin, int64_t end) {
  using X = Values<T>;
  const auto fill = [](double value) { return X(static_cast<T>(value)); };
  const X factor = fill(u.gradient_factor), decay = fill(u.decay), beta2 = fill(u.beta2),
          share2 = fill(1 - u.beta2), scale = fill(u.root), eps = fill(u.eps),
          step = fill(-u.step_size);
  const Lerp<T> momentum(1 - u.beta1), averaging(u.average_weight);
  T* p = static_cast<T*>(t.parameter) + begin;
  const T* g = static_cast<const T*>(t.gradient) + begin;
  T *m = static_cast<T*>(t.exp_avg) + begin, *v = static_cast<T*>(t.exp_avg_sq) + begin;
  T* a = kAverage ? static_cast<T*>(t.average) + begin : nullptr;
  for_values<T>(end - begin, [&](int64_t i, int64_t count) FASTDIFF_HOT {
    const X gradient = X::load(g + i, count) * factor;
    const X first = momentum(X::load(m + i, count), gradient);
    const X second = fmadd(X::load(v + i, count), beta2, share2 * gradient * gradient);
    const X moved =
        fmadd(X::load(p + i, count), decay, step * first / (root(second) / scale + eps));
    first.store(m + i, count);
    second.store(v + i, count);
    moved.store(p + i, count);
    if constexpr (kAverage) averaging(X::load(a + i, count), moved).store(a + i, count);
  });
}

}  // namespace

void adamw_update(const AdamwUpdate& u, const AdamwTensors& t, int64_t begin, int64_t end) {
  for_wide(u.dtype, [&]<class T>() {
    t.average ? update<T, true>(u, t, begin, end) : update<T, false>(u, t, begin, end);
  });
}

// A few hundred elements are summed in the wide type, in four chains, before they are added up in
// float64.
void add_squares(c10::ScalarType dtype, const void* x, int64_t begin, int64_t end, double& sum) {
  for_floating(dtype, [&]<class T>() {
    using X = Values<T>;
    constexpr int64_t kChains = 4, kRow = kChains * X::size, kSummed = 8 * kRow;
    const T* from = static_cast<const T*>(x);
    for (int64_t first = begin; first < end; first += kSummed) {
      const int64_t last = std::min(first + kSummed, end);
      X sums[kChains];
      for (auto& chain : sums) chain = X(0);
      int64_t i = first;
      for (; i + kRow <= last; i += kRow)
        for (int64_t k = 0; k < kChains; ++k) {
          const X value = X::load(from + i + k * X::size);
          sums[k] = fmadd(value, value, sums[k]);
        }
      for_values<T>(last - i, [&](int64_t k, int64_t count) FASTDIFF_HOT {
        const X value = X::load(from + i + k, count);
        sums[0] = fmadd(value, value, sums[0]);
      });
      const X all = (sums[0] + sums[1]) + (sums[2] + sums[3]);
      for (const auto& lanes : all.vector) sum += sum_lanes(lanes);
    }
  });
}

}  // namespace fastdiff::CPU_CAPABILITY
