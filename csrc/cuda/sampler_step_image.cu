// The factor and the limit of each image that a row of a sampler's table needs before the step:
//
//   factor = 1 + rescale (std(m_c) / std(m) - 1)     on m, where guidance is rescaled
//   s = clamp(quantile of |x0_x x + x0_m factor m|, 1, clip_max)     where x0 is thresholded
//
// Layout: as in sampler_step.cu; factor and s of an image are neighbours in the workspace.
//
// Bytes for an image of L bytes (with guidance in brackets): 0 where the row needs neither, (2 L)
// for the factor, and 3 times 2 L (3 L) for the quantile; 4 or 8 bytes are written. The ideal is
// one read, 2 L (3 L), but a small image is read again from the nearest cache.
//
// Design: there is one block per image, because a block can synchronise with itself and so needs
// one launch for any number of sweeps. Few rows need these values, but every step pays for the
// launch: a single one, of few blocks, which read the row and end. It is separate from the step,
// which may overwrite x while other blocks still read x for their statistics. The price is that one
// processor alone reads an image, however large.
//
// Deviations are summed a pack at a time and combined by the formula of Chan et al. (1979). The
// image's first value is subtracted from all: no digits are lost to a mean, and the deviation of a
// constant image is exactly 0.
//
// The quantile interpolates between two order statistics, which are found exactly. The bits of |x0|
// as integers have the order of the values, so that three sweeps with a histogram of 11, 10 and 10
// bits find both: each sweep counts the values that share the leading bits found so far. Bisection
// would take 31 sweeps. Integer sums do not depend on their order, so the counts may be atomic.
#include <algorithm>
#include <cmath>

#include "cuda/sampler_step_image.cuh"

namespace fastdiff::cuda {
namespace {

constexpr int kImageThreads = 512;  // the most; with 1024 the registers would not suffice
constexpr int64_t kImageBlocks = 264;
constexpr int kBins = 2048;

// Mean and sum of squared deviations of m_c and of m, both less their first values.
struct Deviations {
  float count;
  float mean[2], square[2];
};

__device__ __forceinline__ Deviations combined(const Deviations& a, const Deviations& b) {
  Deviations both;
  both.count = a.count + b.count;
  const float share = both.count > 0 ? b.count / both.count : 0.0f;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float delta = b.mean[i] - a.mean[i];
    both.mean[i] = a.mean[i] + delta * share;
    both.square[i] = a.square[i] + b.square[i] + delta * delta * (a.count * share);
  }
  return both;
}

// The deviations of a warp, in lane 0.
__device__ __forceinline__ Deviations combined_by_warp(Deviations value) {
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    Deviations other;
    other.count = __shfl_down_sync(0xffffffffu, value.count, lanes);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      other.mean[i] = __shfl_down_sync(0xffffffffu, value.mean[i], lanes);
      other.square[i] = __shfl_down_sync(0xffffffffu, value.square[i], lanes);
    }
    value = combined(value, other);
  }
  return value;
}

template <class T, int W, bool kGather>
__device__ float rescale_factor(const SamplerStepArgs& a, const float* row, int64_t begin,
                                int64_t end) {
  __shared__ Deviations of_warp[32];
  __shared__ float origin[2], factor;
  using Output = Model<T, W, kGather>;
  float m[W];
  if (threadIdx.x == 0) {
    Output first;
    first.read(a, begin);
    first.guide(a, row, m);
    origin[0] = to_float(first.conditional.value[0]);
    origin[1] = m[0];
  }
  __syncthreads();
  Deviations sum{};
  const auto add = [&](int64_t, const Pack<T, W>&, const Output& output) {
    output.guide(a, row, m);
    Deviations pack{W, {0, 0}, {0, 0}};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float value[W];
#pragma unroll
      for (int k = 0; k < W; ++k) {
        value[k] = (i == 0 ? to_float(output.conditional.value[k]) : m[k]) - origin[i];
        pack.mean[i] += value[k];
      }
      pack.mean[i] *= 1.0f / W;
#pragma unroll
      for (int k = 0; k < W; ++k) {
        const float deviation = value[k] - pack.mean[i];
        pack.square[i] += deviation * deviation;
      }
    }
    sum = combined(sum, pack);
  };
  for_packs<T, W, kGather, false>(a, begin + threadIdx.x * W, end, blockDim.x * W, add);

  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  sum = combined_by_warp(sum);
  if (lane == 0) of_warp[warp] = sum;
  __syncthreads();
  if (warp == 0) {
    sum = lane < static_cast<int>(blockDim.x) / 32 ? of_warp[lane] : Deviations{};
    sum = combined_by_warp(sum);
    if (lane == 0) {
      const float ratio = sum.square[1] == 0 ? 1.0f : sqrtf(sum.square[0] / sum.square[1]);
      factor = 1 + row[kRescale] * (ratio - 1);
    }
  }
  __syncthreads();
  return factor;
}

// One of the two order statistics: the leading bits of its value that are known, and its rank among
// the values with these bits.
struct Rank {
  uint32_t bits;
  uint32_t below;
};

// Finds the next bits of both, from the histograms of these bits. `split`: the known bits of the
// two differ, and each has a histogram. All threads call this.
__device__ void advance(uint32_t (&histogram)[2][kBins], int bins, bool split, Rank (&ranks)[2]) {
  __shared__ uint32_t of_warp[2][32];
  const int per_thread = bins / static_cast<int>(blockDim.x);
  const int first = static_cast<int>(threadIdx.x) * per_thread;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const uint32_t wanted[2] = {ranks[0].below, ranks[1].below};
  const uint32_t found[2] = {ranks[0].bits, ranks[1].bits};
  uint32_t own[2] = {}, before[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    for (int b = 0; b < per_thread; ++b) own[h] += histogram[h][first + b];
    before[h] = own[h];
    for (int lanes = 1; lanes < 32; lanes *= 2) {
      const uint32_t other = __shfl_up_sync(0xffffffffu, before[h], lanes);
      if (lane >= lanes) before[h] += other;
    }
    if (lane == 31) of_warp[h][warp] = before[h];
  }
  __syncthreads();  // all threads have also read the ranks
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    before[h] -= own[h];
    for (int w = 0; w < warp; ++w) before[h] += of_warp[h][w];
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int h = split ? r : 0;
    uint32_t passed = split && r == 1 ? before[1] : before[0];
    for (int b = 0; b < per_thread; ++b) {
      const uint32_t count = histogram[h][first + b];
      if (wanted[r] >= passed && wanted[r] - passed < count)
        ranks[r] = {found[r] * static_cast<uint32_t>(bins) + first + b, wanted[r] - passed};
      passed += count;
    }
  }
  __syncthreads();
}

template <class T, int W, bool kGather>
__device__ float limit(const SamplerStepArgs& a, const float* row, float factor, int64_t begin,
                       int64_t end) {
  __shared__ uint32_t histogram[2][kBins];
  __shared__ Rank ranks[2];
  const int64_t last = end - begin - 1;
  const double position = fmin(static_cast<double>(row[kQuantile]), 1.0) * last;
  const auto below = static_cast<int64_t>(position);
  if (threadIdx.x < 2)
    ranks[threadIdx.x] = {0, static_cast<uint32_t>(min(below + threadIdx.x, last))};

  const float x0_x = row[kX0X], x0_m = row[kX0M];
  bool split = false;
  for (int shift = 20, width = 11; shift >= 0; shift -= 10, width = 10) {
    const int bins = 1 << width;
    for (int b = threadIdx.x; b < 2 * kBins; b += blockDim.x) histogram[b / kBins][b % kBins] = 0;
    __syncthreads();
    const uint32_t low = ranks[0].bits, high = ranks[1].bits;
    bool broken = false;
    const auto count = [&](int64_t, const Pack<T, W>& x, const Model<T, W, kGather>& output) {
      float m[W];
      output.guide(a, row, m);
#pragma unroll
      for (int k = 0; k < W; ++k) {
        const float x0 = x0_x * to_float(x.value[k]) + x0_m * (m[k] * factor);
        const uint32_t bits = __float_as_uint(x0) & 0x7FFFFFFF;
        broken |= bits > 0x7F800000;
        const uint32_t known = bits >> shift >> width;
        const uint32_t bin = bits >> shift & (bins - 1);
        if (known == low) atomicAdd(&histogram[0][bin], 1u);
        if (split && known == high) atomicAdd(&histogram[1][bin], 1u);
      }
    };
    for_packs<T, W, kGather, true>(a, begin + threadIdx.x * W, end, blockDim.x * W, count);
    if (__syncthreads_or(broken)) return __int_as_float(0x7FC00000);
    advance(histogram, bins, split, ranks);
    split = ranks[0].bits != ranks[1].bits;
  }
  const double low = __uint_as_float(ranks[0].bits), high = __uint_as_float(ranks[1].bits);
  const double share = position - static_cast<double>(below);
  const auto found = static_cast<float>(share == 0 ? low : low + share * (high - low));
  const float raised = found < 1 ? 1.0f : found;  // a NaN stays NaN
  __syncthreads();                                // before the ranks of the next image
  return raised > row[kClipMax] ? row[kClipMax] : raised;
}

template <class T, int W, bool kGather>
__global__ void __launch_bounds__(kImageThreads, 1) sampler_step_image_kernel(SamplerStepArgs a) {
  const float* row = read_row(a);
  if (!rescales(a, row) && !thresholds(row)) return;
  const int64_t length = image_length(a);
  for (int64_t n = blockIdx.x; n < a.images; n += gridDim.x) {
    const int64_t begin = n * length, end = begin + length;
    float factor = 1;
    if (rescales(a, row)) {
      factor = rescale_factor<T, W, kGather>(a, row, begin, end);
      if (threadIdx.x == 0) store_one(factor_of(a, n), factor);
    }
    if (thresholds(row)) {
      const float s = limit<T, W, kGather>(a, row, factor, begin, end);
      if (threadIdx.x == 0) store_one(limit_of(a, n), s);
    }
  }
}

}  // namespace

void sampler_step_image_cuda(const SamplerStepArgs& args, Stream stream) {
  const auto blocks = static_cast<unsigned>(std::min(args.images, kImageBlocks));
  for_dtype(args.dtype, [&]<class T>(T) {
    const bool wide = packs<T>(args), gather = gathers<T>(args);
    const int64_t packed = image_length(args) / (wide ? kWidth<T> : 1);
    const unsigned threads = packed <= 256 ? 256 : kImageThreads;
    const auto launch = [&](auto kernel) {
      FASTDIFF_LAUNCH(kernel, dim3(blocks), dim3(threads), 0, stream, args);
    };
    if (!wide) {
      launch(sampler_step_image_kernel<T, 1, false>);
    } else if (gather) {
      launch(sampler_step_image_kernel<T, kWidth<T>, true>);
    } else {
      launch(sampler_step_image_kernel<T, kWidth<T>, false>);
    }
  });
}

}  // namespace fastdiff::cuda
