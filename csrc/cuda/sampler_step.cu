// One row of a sampler's table (fastdiff/samplers/table.py). With the model's output m and noise z:
//
//   m  = m_u + guidance (m_c - m_u), times a factor per image if guidance is rescaled
//   x0 = clamp(x0_x x + x0_m m, low, high), or clamp(.., -s, s) / s with a limit s per image
//   x' = out_x x + out_x0 x0 + out_m m + sum h_j history_j + noise exp((logvar + logvar_v v) / 2) z
//   history[slot] = keep_x x + keep_x0 x0 + keep_m m + keep_noise z
//
// Layout: dense, channels-first or channels-last, walked flat. An element's place in its image is
// needed only for variance channels and for noise from a seed.
//
// Bytes: reads x, m (m_u and m_c), v, z and the slots with a coefficient once, and writes x' and
// the slot. For images of L bytes that is 3 L, with guidance 4 L, 1 L for each of v and z with a
// coefficient, and 4 bytes per element for each slot read or written: the minimum. Each block also
// reads the row. Where the row asks for a factor or a limit of whole images, the bytes of
// sampler_step_image.cu are added. Noise from a seed is computed on the chip and never in memory.
//
// Design: everything that depends on the row is decided in the kernel, by branches that all threads
// of the launch take alike, so that the host never waits for a step that the device counts. The
// first elements are loaded while the row is read, which takes two reads one after the other.
#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "cuda/philox.cuh"
#include "cuda/sampler_step.h"
#include "cuda/sampler_step_image.cuh"

namespace fastdiff::cuda {
namespace {

constexpr int kThreads = 256;      // the most in a block
constexpr int kSmallThreads = 64;  // with few packs, so that more processors have work
constexpr int64_t kBlocks = 1056;  // 8 per processor of 132: with more packs, a block takes several
constexpr int64_t kManyPacks = 65536;

// Computes the noise of the elements first..end-1 into shared memory, by all threads of the block,
// where neighbours in memory are of different channels or not aligned to a counter's four elements.
//
// If 4 divides the pixels, a counter's values are of one channel and pixels 4 g .. 4 g + 3, which
// are C elements apart. If the range is long enough for these, each counter is computed once, and
// its values in the range are written. streams[n - first_image] is the stream of image n.
__device__ __forceinline__ void draw_shared(const SamplerStepArgs& a, const PhiloxStream* streams,
                                            int64_t first_image, int64_t first, int64_t end,
                                            float* z) {
  const int64_t channels = a.channels, pixels = a.pixels, length = image_length(a);
  const int threads = static_cast<int>(blockDim.x);
  if (a.channels_last && pixels % 4 == 0 && 4 * channels <= end - first) {
    const int64_t group = quotient(first, 4 * channels);
    const int64_t count = (quotient(end - 1, 4 * channels) - group + 1) * channels;
    for (int64_t task = threadIdx.x; task < count; task += threads) {
      const int64_t row = quotient(task, channels), c = task - row * channels;
      const int64_t pixel = 4 * (group + row), n = quotient(pixel, pixels);  // of all images
      float four[4];
      streams[n - first_image].normal((c * pixels + pixel - n * pixels) / 4, four);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int64_t at = (pixel + j) * channels + c - first;
        if (at >= 0 && at < end - first) z[at] = four[j];
      }
    }
  } else {
    for (int64_t e = first + threadIdx.x; e < end; e += threads) {
      const int64_t n = quotient(e, length);
      int64_t element = e - n * length;
      if (a.channels_last) {
        const int64_t pixel = quotient(element, channels);
        element = (element - pixel * channels) * pixels + pixel;
      }
      z[e - first] = streams[n - first_image].normal_at(element);
    }
  }
}

// Noise of the elements 4 group .. 4 group + W - 1 of an image.
template <int W>
__device__ __forceinline__ void draw(const PhiloxStream& stream, int64_t group, float (&z)[W]) {
#pragma unroll
  for (int k = 0; k < W; k += 4) {
    float four[4];
    stream.normal(group + k / 4, four);
#pragma unroll
    for (int i = 0; i < 4; ++i) z[k + i] = four[i];
  }
}

// W floats of a slot.
template <int W>
__device__ __forceinline__ void load_slot(const float* slot, float (&to)[W]) {
  constexpr int kPart = W < 4 ? W : 4;
#pragma unroll
  for (int k = 0; k < W; k += kPart) {
    const auto part = load<kPart>(slot + k);
#pragma unroll
    for (int i = 0; i < kPart; ++i) to[k + i] = part.value[i];
  }
}

template <int W>
__device__ __forceinline__ void store_slot(float* slot, const float (&from)[W]) {
  constexpr int kPart = W < 4 ? W : 4;
#pragma unroll
  for (int k = 0; k < W; k += kPart) {
    Pack<float, kPart> part;
#pragma unroll
    for (int i = 0; i < kPart; ++i) part.value[i] = from[k + i];
    store(slot + k, part);
  }
}

template <class T, int W, bool kGather>
__global__ void __launch_bounds__(kThreads, 2) sampler_step_kernel(SamplerStepArgs a) {
  constexpr int kSlotsAtOnce = W == 8 ? 2 : 4;  // loaded together
  // The noise of the block's elements, and the streams of their images, of which there are no more.
  __shared__ float shared_z[kThreads * W], factors[kThreads], limits[kThreads];
  alignas(16) __shared__ unsigned char stream_memory[kThreads * sizeof(PhiloxStream)];
  auto* streams = reinterpret_cast<PhiloxStream*>(stream_memory);
  const T* x_of = static_cast<const T*>(a.x);
  T* out = static_cast<T*>(a.out);
  const int64_t length = image_length(a), total = a.images * length;
  const int64_t tile = static_cast<int64_t>(blockDim.x) * W, stride = gridDim.x * tile;
  int64_t first = blockIdx.x * tile;  // first element of the block
  const auto own = [&] { return first + threadIdx.x * W; };

  Pack<T, W> next_x{};
  Model<T, W, kGather> next{};
  const auto read_next = [&](int64_t e) {
    if (e >= total) return;
    next_x = load<W>(x_of + e);
    next.read(a, e);
  };
  read_next(own());
  const float* row = read_row(a);
  const bool rescaled = rescales(a, row), thresholded = thresholds(row);
  const bool wanted = row[kNoise] != 0 || row[kKeepNoise] != 0;
  const bool noisy = wanted && (a.noise || a.seed), seeded = wanted && a.seed;
  const bool learned = a.has_variance && row[kNoise] != 0 && row[kLogvarV] != 0;
  float* kept = nullptr;  // the slot that is written
  if (row[kSlot] >= 0 && row[kSlot] < static_cast<float>(a.depth))
    kept = a.history + static_cast<int64_t>(row[kSlot]) * a.slot_stride;
  const bool shares = seeded && (a.channels_last || W % 4 != 0);
  const bool by_image = seeded || rescaled || thresholded;

  for (; first < total; first += stride) {
    const int64_t e = own(), end = min(first + tile, total);
    const int64_t first_image = by_image ? quotient(first, length) : 0;
    if (by_image) {
      __syncthreads();  // all threads have read the noise of the previous elements
      const int64_t count = quotient(end - 1, length) - first_image + 1;
      for (int64_t i = threadIdx.x; i < count; i += blockDim.x) {
        const int64_t n = first_image + i;
        if (seeded)
          streams[i] = PhiloxStream(a.seed + 2 * n, static_cast<uint32_t>(load_one(a.step)));
        if (rescaled) factors[i] = load_one(factor_of(a, n));
        if (thresholded) limits[i] = load_one(limit_of(a, n));
      }
      __syncthreads();
    }
    if (shares) {
      draw_shared(a, streams, first_image, first, end, shared_z);
      __syncthreads();
    }
    if (e >= total) continue;
    const Pack<T, W> x_now = next_x;
    const Model<T, W, kGather> now = next;
    read_next(e + stride);

    const int64_t n = by_image ? quotient(e, length) : 0, i = n - first_image;
    Pack<T, W> noise{}, v{};
    if (noisy && a.noise) noise = load<W>(static_cast<const T*>(a.noise) + e);
    if (noisy && learned) v = Model<T, W, kGather>::variance(a, e);

    float x[W], m[W], x0[W], y[W], z[W];
    widen(x_now, x);
    now.guide(a, row, m);
    if (rescaled) {
      const float factor = factors[i];
#pragma unroll
      for (int k = 0; k < W; ++k) m[k] *= factor;
    }
    // A NaN stays NaN: it is neither below nor above a limit.
    const float s = thresholded ? limits[i] : 1.0f;
    const float low = thresholded ? -s : row[kClipMin], high = thresholded ? s : row[kClipMax];
#pragma unroll
    for (int k = 0; k < W; ++k) {
      x0[k] = row[kX0X] * x[k] + row[kX0M] * m[k];
      x0[k] = x0[k] < low ? low : x0[k];
      x0[k] = x0[k] > high ? high : x0[k];
      if (thresholded) x0[k] /= s;
      y[k] = row[kOutX] * x[k] + (row[kOutX0] * x0[k] + row[kOutM] * m[k]);
    }
    for (int j = 0; j < a.depth; j += kSlotsAtOnce) {
      float h[kSlotsAtOnce][W] = {};
#pragma unroll
      for (int l = 0; l < kSlotsAtOnce; ++l)
        if (j + l < a.depth && row[kSamplerColumns + j + l] != 0)
          load_slot<W>(a.history + (j + l) * a.slot_stride + e, h[l]);
#pragma unroll
      for (int l = 0; l < kSlotsAtOnce; ++l) {
        if (j + l >= a.depth || row[kSamplerColumns + j + l] == 0) continue;
#pragma unroll
        for (int k = 0; k < W; ++k) y[k] += row[kSamplerColumns + j + l] * h[l][k];
      }
    }
    if (shares) {
#pragma unroll
      for (int k = 0; k < W; ++k) z[k] = shared_z[e - first + k];
    } else if (seeded) {
      if constexpr (W % 4 == 0) draw(streams[i], (e - n * length) / 4, z);
    } else {
      widen(noise, z);
    }
    if (noisy && learned) {
#pragma unroll
      for (int k = 0; k < W; ++k) {
        const float logvar = row[kLogvar] + row[kLogvarV] * to_float(v.value[k]);
        y[k] += row[kNoise] * expf(logvar / 2) * z[k];
      }
    } else if (noisy && row[kNoise] != 0) {
      const float amount = row[kNoise] * expf(row[kLogvar] / 2);
#pragma unroll
      for (int k = 0; k < W; ++k) y[k] += amount * z[k];
    }
    if (kept) {
      float value[W];
#pragma unroll
      for (int k = 0; k < W; ++k)
        value[k] = row[kKeepX] * x[k] + (row[kKeepX0] * x0[k] + row[kKeepM] * m[k]);
      if (noisy && row[kKeepNoise] != 0) {
#pragma unroll
        for (int k = 0; k < W; ++k) value[k] += row[kKeepNoise] * z[k];
      }
      store_slot<W>(kept + e, value);
    }
    Pack<T, W> result;
#pragma unroll
    for (int k = 0; k < W; ++k) result.value[k] = from_float<T>(y[k]);
    store(out + e, result);
  }
}

}  // namespace

int64_t sampler_step_workspace(const SamplerStepArgs& args) {
  return args.images * 2 * static_cast<int64_t>(sizeof(float));
}

void sampler_step_cuda(const SamplerStepArgs& args, Stream stream) {
  const int64_t total = args.images * image_length(args);
  if (total == 0) return;
  if (image_length(args) >> 32)
    throw std::runtime_error("sampler_step: an image of 2^32 elements or more");
  sampler_step_image_cuda(args, stream);
  for_dtype(args.dtype, [&]<class T>(T) {
    const bool wide = packs<T>(args);
    const auto launch = [&](auto kernel, int width) {
      const int64_t count = total / width;
      const int threads = count < kManyPacks ? kSmallThreads : kThreads;
      const int64_t tiles = (count + threads - 1) / threads;
      const int64_t each = (tiles + kBlocks - 1) / kBlocks;
      const auto blocks = static_cast<unsigned>((tiles + each - 1) / each);
      FASTDIFF_LAUNCH(kernel, dim3(blocks), dim3(threads), 0, stream, args);
    };
    if (!wide) {
      launch(sampler_step_kernel<T, 1, false>, 1);
    } else if (gathers<T>(args)) {
      launch(sampler_step_kernel<T, kWidth<T>, true>, kWidth<T>);
    } else {
      launch(sampler_step_kernel<T, kWidth<T>, false>, kWidth<T>);
    }
  });
}

}  // namespace fastdiff::cuda
