// Shared by the two kernels of sampler_step: the row, and m, the model's output with guidance.
#pragma once

#include <cstdint>

#include "cuda/device.cuh"
#include "cuda/sampler_step.h"

namespace fastdiff::cuda {

constexpr int kRowLength = kSamplerColumns + kSamplerDepth;

// The row in shared memory; all threads of the block call this. Slots beyond the history's depth
// have a coefficient of 0. A step outside the table gives a row that makes every element NaN and
// has no other effect.
__device__ __forceinline__ const float* read_row(const SamplerStepArgs& a) {
  static_assert(kRowLength <= 32, "one warp reads the row");
  __shared__ float row[kRowLength];
  const int j = static_cast<int>(threadIdx.x);
  if (j < 32) {
    const int64_t step = __shfl_sync(0xffffffffu, j == 0 ? load_one(a.step) : 0, 0);
    float value = 0;
    if (step < 0 || step >= a.rows) {
      value = j == kOutX ? __int_as_float(0x7FC00000) : j == kSlot ? -1.0f : 0.0f;
    } else if (j < kSamplerColumns + a.depth) {
      value = load_one(a.table + step * a.row_stride + j * a.column_stride);
    }
    if (j < kRowLength) row[j] = value;
  }
  __syncthreads();
  return row;
}

// Which values of whole images the row needs.
__device__ __forceinline__ bool rescales(const SamplerStepArgs& a, const float* row) {
  return a.guided && row[kRescale] != 0;
}
__device__ __forceinline__ bool thresholds(const float* row) { return row[kQuantile] > 0; }

// The values of image n: the factor on m, and the limit s of x0. Each is written only if needed.
__device__ __forceinline__ float* factor_of(const SamplerStepArgs& a, int64_t n) {
  return static_cast<float*>(a.workspace) + 2 * n;
}
__device__ __forceinline__ float* limit_of(const SamplerStepArgs& a, int64_t n) {
  return factor_of(a, n) + 1;
}

__host__ __device__ __forceinline__ int64_t image_length(const SamplerStepArgs& a) {
  return a.channels * a.pixels;
}

// a / b, in a third of the instructions where 32 bits hold both, which is nearly always so.
__device__ __forceinline__ int64_t quotient(int64_t a, int64_t b) {
  if (((a | b) >> 32) == 0) return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
  return a / b;
}

template <class T, int W>
__device__ __forceinline__ void widen(const Pack<T, W>& pack, float (&to)[W]) {
#pragma unroll
  for (int k = 0; k < W; ++k) to[k] = to_float(pack.value[k]);
}

// The model's output beside W elements of x, the first of them element e of all images.
//
// Without variance channels entry e of the output belongs to element e. With variance channels,
// runs of m and v alternate: a run is an image (channels-first) or a pixel (channels-last). So r =
// e / run runs of v come before element e, and its entry is e + r run. Where a run is no multiple
// of W (kGather), the W entries may not be neighbours, and are read one by one.
template <class T, int W, bool kGather>
struct Model {
  Pack<T, W> m, conditional;

  static __device__ __forceinline__ int64_t run(const SamplerStepArgs& a) {
    return a.channels_last ? a.channels : image_length(a);
  }

  static __device__ __forceinline__ Pack<T, W> read(const SamplerStepArgs& a, int64_t e,
                                                    int64_t shift) {
    const T* p = static_cast<const T*>(a.model_out) + e + shift;
    if (!a.has_variance) return load<W>(p);
    const int64_t length = run(a);
    int64_t before = quotient(e, length) * length;
    if constexpr (!kGather) return load<W>(p + before);
    Pack<T, W> pack;
    int64_t left = length + before - e;  // elements left of this run
#pragma unroll
    for (int k = 0; k < W; ++k) {
      pack.value[k] = load_one(p + before + k);
      if (--left == 0) {
        left = length;
        before += length;
      }
    }
    return pack;
  }

  // From the unconditional half to the conditional one.
  static __device__ __forceinline__ int64_t half(const SamplerStepArgs& a) {
    return a.guided ? a.images * image_length(a) << (a.has_variance ? 1 : 0) : 0;
  }

  __device__ __forceinline__ void read(const SamplerStepArgs& a, int64_t e) {
    m = read(a, e, 0);
    if (a.guided) conditional = read(a, e, half(a));
  }

  static __device__ __forceinline__ Pack<T, W> variance(const SamplerStepArgs& a, int64_t e) {
    return read(a, e, half(a) + run(a));
  }

  __device__ __forceinline__ void guide(const SamplerStepArgs& a, const float* row,
                                        float (&to)[W]) const {
    widen(m, to);
    if (!a.guided) return;
    const float guidance = row[kGuidance];
#pragma unroll
    for (int k = 0; k < W; ++k) to[k] += guidance * (to_float(conditional.value[k]) - to[k]);
  }
};

// Calls body(e, x, output) for every stride-th pack from `first` up to `end`, while the next pack
// is loaded. Without kWithX x is not read.
template <class T, int W, bool kGather, bool kWithX, class Body>
__device__ __forceinline__ void for_packs(const SamplerStepArgs& a, int64_t first, int64_t end,
                                          int64_t stride, Body&& body) {
  const T* x = static_cast<const T*>(a.x);
  Pack<T, W> next_x{};
  Model<T, W, kGather> next{};
  const auto read = [&](int64_t e) {
    if constexpr (kWithX) next_x = load<W>(x + e);
    next.read(a, e);
  };
  if (first < end) read(first);
  for (int64_t e = first; e < end; e += stride) {
    const auto x_now = next_x;
    const auto now = next;
    if (e + stride < end) read(e + stride);
    body(e, x_now, now);
  }
}

// Whether packs of kWidth<T> elements can be used, and whether m is then gathered.
template <class T>
inline bool packs(const SamplerStepArgs& a) {
  const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  return image_length(a) % kWidth<T> == 0 && aligned(a.x) && aligned(a.model_out) &&
         aligned(a.noise) && aligned(a.out) && aligned(a.history) && a.slot_stride % 4 == 0;
}
template <class T>
inline bool gathers(const SamplerStepArgs& a) {
  return a.has_variance && a.channels_last && a.channels % kWidth<T> != 0;
}

// The launch of sampler_step_image.cu.
void sampler_step_image_cuda(const SamplerStepArgs& args, Stream stream);

}  // namespace fastdiff::cuda
