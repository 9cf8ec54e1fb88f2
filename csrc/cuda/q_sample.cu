// x_t = signal[t] x_0 + sigma[t] noise. The noise is given, or computed here from a seed.
//
// q_sample reads 2 S and writes 1 S for images of S bytes, the minimum. All tensors have the same
// memory layout, and are walked flat.
//
// q_sample_from_seed reads 1 S and writes 1 S, the minimum. The noise is never in memory and
// never rounded: a kernel that needs it later computes it again. noise_unit.cuh says which elements
// a thread takes.
#include "cuda/access.cuh"
#include "cuda/noise_unit.cuh"
#include "cuda/q_sample.h"

namespace fastdiff::cuda {
namespace {

struct Coefficients {
  float signal, sigma;

  template <class Args>
  __device__ __forceinline__ Coefficients(const Args& a, int64_t n) {
    const int64_t t = load_one(a.t + n);
    signal = sigma = __int_as_float(0x7fffffff);
    if (t >= 0 && t < a.steps) {
      signal = load_one(a.signal + t);
      sigma = load_one(a.sigma + t);
    }
  }

  // Both kernels round alike: with the float32 noise of a seed, q_sample gives the same x_t.
  __device__ __forceinline__ float operator()(float x0, float noise) const {
    return __fmaf_rn(signal, x0, sigma * noise);
  }
};

template <class T, int W, int Each>
__global__ void __launch_bounds__(kThreads) q_sample_kernel(QSampleArgs a) {
  const int64_t stride = static_cast<int64_t>(blockDim.x) * W;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * Each * stride + threadIdx.x * W;
#pragma unroll 1
  for (int64_t n = blockIdx.y; n < a.images; n += gridDim.y) {
    const T* x0 = static_cast<const T*>(a.x0) + n * a.image;
    const T* noise = static_cast<const T*>(a.noise) + n * a.image;
    T* out = static_cast<T*>(a.out) + n * a.image;
    Pack<T, W> x[Each], z[Each];
#pragma unroll
    for (int u = 0; u < Each; ++u) {
      const int64_t i = first + u * stride;
      if (i < a.image) {
        x[u] = load<W>(x0 + i);
        z[u] = load<W>(noise + i);
      }
    }
    const Coefficients noised(a, n);  // after the loads, which do not depend on it
#pragma unroll
    for (int u = 0; u < Each; ++u) {
      const int64_t i = first + u * stride;
      if (i < a.image) {
#pragma unroll
        for (int j = 0; j < W; ++j)
          x[u].value[j] = from_float<T>(noised(to_float(x[u].value[j]), to_float(z[u].value[j])));
        store(out + i, x[u]);
      }
    }
  }
}

template <class T, int W, int Form>
__global__ void __launch_bounds__(kThreads)
    q_sample_from_seed_kernel(QSampleFromSeedArgs a, NoiseImage image) {
  using Unit = NoiseUnit<T, W, Form>;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= image.units) return;
  const Unit unit(image, i);
#pragma unroll 1
  for (int64_t n = blockIdx.y; n < a.images; n += gridDim.y) {
    const T* x0 = static_cast<const T*>(a.x0) + n * a.channels * a.pixels;
    T* out = static_cast<T*>(a.out) + n * a.channels * a.pixels;
    Pack<T, W> x[Unit::kVectors];
#pragma unroll
    for (int v = 0; v < Unit::kVectors; ++v)
      if (unit.inside(v)) x[v] = load<W>(x0 + unit.at(v));
    const Coefficients noised(a, n);
    float z[Unit::kVectors][W];
    unit.fill(PhiloxStream(a.seed + 2 * n, static_cast<uint32_t>(load_one(a.row))), z);
#pragma unroll
    for (int v = 0; v < Unit::kVectors; ++v) {
      if (!unit.inside(v)) continue;
#pragma unroll
      for (int j = 0; j < W; ++j) z[v][j] = noised(to_float(x[v].value[j]), z[v][j]);
      store(out + unit.at(v), from_floats<T>(z[v]));
    }
  }
}

}  // namespace

void q_sample_cuda(const QSampleArgs& a, Stream stream) {
  for_dtype(a.dtype, [&](auto tag) {
    using T = decltype(tag);
    const int64_t alignment = common_alignment(a.x0, a.noise, a.out, a.image * sizeof(T));
    for_width<T>(alignment, [&](auto width) {
      constexpr int W = decltype(width)::value;
      const int64_t vectors = a.image / W;
      if (a.images * vectors >= kManyVectors) {
        const FlatPlan plan = flat_plan(vectors, a.images, kUnroll);
        FASTDIFF_LAUNCH(q_sample_kernel<T, W, kUnroll>, plan.grid, plan.threads, 0, stream, a);
      } else {
        const FlatPlan plan = flat_plan(vectors, a.images, 1);
        FASTDIFF_LAUNCH(q_sample_kernel<T, W, 1>, plan.grid, plan.threads, 0, stream, a);
      }
    });
  });
}

void q_sample_from_seed_cuda(const QSampleFromSeedArgs& a, Stream stream) {
  for_dtype(a.dtype, [&](auto tag) {
    using T = decltype(tag);
    for_noise_unit<T>(
        a.channels_last, a.channels, a.pixels, common_alignment(a.x0, a.out),
        [&](auto width, auto form, const NoiseImage& image) {
          const FlatPlan plan = flat_plan(image.units, a.images, 1);
          FASTDIFF_LAUNCH(
              q_sample_from_seed_kernel<T, decltype(width)::value, decltype(form)::value>,
              plan.grid, plan.threads, 0, stream, a, image);
        });
  });
}

}  // namespace fastdiff::cuda
