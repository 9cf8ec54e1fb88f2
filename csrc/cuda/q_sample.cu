// x_t = signal[t] x_0 + sigma[t] noise, the noise given or drawn here from a seed.
//
// q_sample: reads 2 S and writes 1 S for images of S bytes, which is the least there is; the
// tensors share a layout, whichever it is, and are walked flat. q_sample_from_seed: reads 1 S and
// writes 2 S (x_t and the noise, which the loss needs), the least there is, where drawing the noise
// first takes 4 S and two launches.
//
// A counter of Philox gives four elements in a row of [C, pixels]. Channels-first a thread's vector
// holds them. Channels-last they are the same channel of four pixels, so a thread takes four pixels
// of as many channels as a vector holds; images of three or four channels, whose pixels are
// narrower than a vector, are taken by whole pixels, four or eight in a thread, which begin and end
// with a vector. No counter is computed twice but where the pixels are not a multiple of four.
#include "cuda/access.cuh"
#include "cuda/philox.cuh"
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

  // Rounded the same way in every kernel, so that given and drawn noise give the same x_t.
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
    const Coefficients noised(a, n);  // after the loads that do not wait for it
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

// The three tensors of an image, and what is written of W neighbours in memory.
template <class T>
struct Image {
  const T* x0;
  T* out;
  T* noise;

  __device__ __forceinline__ Image(const QSampleFromSeedArgs& a, int64_t n) {
    const int64_t offset = n * a.channels * a.pixels;
    x0 = static_cast<const T*>(a.x0) + offset;
    out = static_cast<T*>(a.out) + offset;
    noise = static_cast<T*>(a.noise) + offset;
  }

  // x_t is made of the noise as it is stored.
  template <int W>
  __device__ __forceinline__ void write(int64_t i, Pack<T, W> x, const float (&z)[W],
                                        const Coefficients& noised) const {
    const Pack<T, W> rounded = from_floats<T>(z);
#pragma unroll
    for (int j = 0; j < W; ++j)
      x.value[j] = from_float<T>(noised(to_float(x.value[j]), to_float(rounded.value[j])));
    store(noise + i, rounded);
    store(out + i, x);
  }
};

__device__ __forceinline__ PhiloxStream stream_of(const QSampleFromSeedArgs& a, int64_t n) {
  return PhiloxStream(a.seed + 2 * n, static_cast<uint32_t>(load_one(a.row)));
}

// Channels-first: a unit is as many elements as 16 bytes hold, moved W at a time.
template <class T, int W>
__global__ void __launch_bounds__(kThreads) from_seed_rows_kernel(QSampleFromSeedArgs a) {
  constexpr int kUnit = kWidth<T>;
  const int64_t size = a.channels * a.pixels;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * kUnit;
  if (first >= size) return;
#pragma unroll 1
  for (int64_t n = blockIdx.y; n < a.images; n += gridDim.y) {
    const Image<T> image(a, n);
    const Coefficients noised(a, n);
    const PhiloxStream stream = stream_of(a, n);
    float z[kUnit / 4][4];
#pragma unroll
    for (int q = 0; q < kUnit / 4; ++q) stream.normal(first / 4 + q, z[q]);
#pragma unroll
    for (int i = 0; i < kUnit; i += W) {
      if (W < kUnit && first + i >= size) break;
      float part[W];
#pragma unroll
      for (int j = 0; j < W; ++j) part[j] = z[(i + j) / 4][(i + j) % 4];
      image.write(first + i, load<W>(image.x0 + first + i), part, noised);
    }
  }
}

// Channels-last: a unit is W channels of four pixels, or of one where the pixels of an image are
// not a multiple of four and a counter's elements lie in different channels.
template <class T, int W, int Pixels>
__global__ void __launch_bounds__(kThreads)
    from_seed_pixels_kernel(QSampleFromSeedArgs a, int64_t vectors, Divisor per_pixel) {
  const int64_t unit = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t group = per_pixel.divide(unit), c = (unit - group * vectors) * W;
  const int64_t pixel = group * Pixels;
  if (pixel >= a.pixels) return;
#pragma unroll 1
  for (int64_t n = blockIdx.y; n < a.images; n += gridDim.y) {
    const Image<T> image(a, n);
    const Coefficients noised(a, n);
    const PhiloxStream stream = stream_of(a, n);
    const int64_t first = pixel * a.channels + c;
    Pack<T, W> x[Pixels];
#pragma unroll
    for (int p = 0; p < Pixels; ++p) x[p] = load<W>(image.x0 + first + p * a.channels);
    float z[Pixels][W];
#pragma unroll
    for (int j = 0; j < W; ++j) {
      const int64_t element = (c + j) * a.pixels + pixel;
      if constexpr (Pixels == 4) {
        float values[4];
        stream.normal(element / 4, values);
#pragma unroll
        for (int p = 0; p < 4; ++p) z[p][j] = values[p];
      } else {
        z[0][j] = stream.normal_at(element);
      }
    }
#pragma unroll
    for (int p = 0; p < Pixels; ++p) image.write(first + p * a.channels, x[p], z[p], noised);
  }
}

// Whole pixels in a thread: the fewest, a multiple of four, that are a multiple of 16 bytes.
template <class T, int Channels>
constexpr int kWholePixels = 4 * Channels % kWidth<T> == 0 ? 4 : 8;

// Channels-last, few channels: a unit is kWholePixels pixels with all their channels.
template <class T, int Channels>
__global__ void __launch_bounds__(kThreads) from_seed_whole_pixels_kernel(QSampleFromSeedArgs a) {
  constexpr int kPixels = kWholePixels<T, Channels>, W = kWidth<T>;
  constexpr int kVectors = kPixels * Channels / W;
  const int64_t pixel = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * kPixels;
  if (pixel >= a.pixels) return;
#pragma unroll 1
  for (int64_t n = blockIdx.y; n < a.images; n += gridDim.y) {
    const Image<T> image(a, n);
    const Coefficients noised(a, n);
    const PhiloxStream stream = stream_of(a, n);
    Pack<T, W> x[kVectors];
#pragma unroll
    for (int v = 0; v < kVectors; ++v) x[v] = load<W>(image.x0 + pixel * Channels + v * W);
    float z[kVectors][W];
#pragma unroll
    for (int c = 0; c < Channels; ++c) {
#pragma unroll
      for (int p = 0; p < kPixels; p += 4) {
        float values[4];
        stream.normal((c * a.pixels + pixel + p) / 4, values);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int element = (p + j) * Channels + c;
          z[element / W][element % W] = values[j];
        }
      }
    }
#pragma unroll
    for (int v = 0; v < kVectors; ++v) image.write(pixel * Channels + v * W, x[v], z[v], noised);
  }
}

template <class T, int Channels>
bool launched_by_whole_pixels(const QSampleFromSeedArgs& a, Stream stream) {
  constexpr int kPixels = kWholePixels<T, Channels>;
  if (a.channels != Channels || a.pixels % kPixels != 0) return false;
  const FlatPlan plan = flat_plan(a.pixels / kPixels, a.images, 1);
  FASTDIFF_LAUNCH(from_seed_whole_pixels_kernel<T, Channels>, plan.grid, plan.threads, 0, stream,
                  a);
  return true;
}

template <class T>
void launch_channels_last(const QSampleFromSeedArgs& a, Stream stream) {
  const int64_t alignment = common_alignment(a.x0, a.out, a.noise);
  if (alignment == 16 &&
      (launched_by_whole_pixels<T, 3>(a, stream) || launched_by_whole_pixels<T, 4>(a, stream)))
    return;
  for_width<T>(common_alignment(alignment, a.channels * sizeof(T)), [&](auto width) {
    constexpr int W = decltype(width)::value;
    const int64_t vectors = a.channels / W;
    if (a.pixels % 4 == 0) {
      const FlatPlan plan = flat_plan(a.pixels / 4 * vectors, a.images, 1);
      FASTDIFF_LAUNCH(from_seed_pixels_kernel<T, W, 4>, plan.grid, plan.threads, 0, stream, a,
                      vectors, Divisor(vectors));
    } else {
      const FlatPlan plan = flat_plan(a.pixels * vectors, a.images, 1);
      FASTDIFF_LAUNCH(from_seed_pixels_kernel<T, W, 1>, plan.grid, plan.threads, 0, stream, a,
                      vectors, Divisor(vectors));
    }
  });
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
    if (a.channels_last && a.channels > 1 && a.pixels > 1)
      return launch_channels_last<T>(a, stream);
    const int64_t size = a.channels * a.pixels;
    const FlatPlan plan = flat_plan(ceil_div(size, kWidth<T>), a.images, 1);
    for_width<T>(common_alignment(a.x0, a.out, a.noise, size * sizeof(T)), [&](auto width) {
      FASTDIFF_LAUNCH(from_seed_rows_kernel<T, decltype(width)::value>, plan.grid, plan.threads, 0,
                      stream, a);
    });
  });
}

}  // namespace fastdiff::cuda
