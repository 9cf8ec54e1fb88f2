// Statistics of a channel over a span of pixels: count, mean and sum of squared deviations.
//
// In memory they are float32 [N, S, 4, C]. The four planes of a span are the counts, the means, the
// remainders of the means (mean = plane 1 + plane 2, to about twice float32's digits) and the sums
// of squared deviations. A span without pixels is all zeros.
//
// A thread computes the statistics of the values in its registers in two passes, without a memory
// access. Statistics are merged by Chan et al. 1983, "Algorithms for computing the sample
// variance", eq. 2.1, always in the same order. A mean is kept as a float32 number and a small
// remainder: the difference of two such means is exact where it matters, so that no digits are lost
// with a mean of 10,000 and a deviation of 0.1.
//
//   channels-first: lanes of a warp hold pieces of one channel:
//     Moments m = moments_of<kPacks, W>(packs, value); m = merge_lanes(m, 32); lane 0 stores it.
//   channels-last: a thread holds W channels of every R-th pixel, R = `rows` threads share them:
//     RowMoments rows(shared, R, channels); rows.put(row, channel, m) for each of its channels;
//     __syncthreads(); then one thread a channel stores rows.merge(channel).
//   More values than fit in registers: merge(m, moments_of(...)) chunk by chunk before that.
#pragma once

#include "cuda/device.cuh"

namespace fastdiff::cuda {

struct Moments {
  float count = 0, mean = 0, rest = 0, m2 = 0;  // the mean is mean + rest
};

// The moments of value(j, e) for j < count and e < kElements, where count <= kPacks.
template <int kPacks, int kElements, class Value>
__device__ __forceinline__ Moments moments_of(int count, Value&& value) {
  if (count <= 0) return {};
  const float n = static_cast<float>(count * kElements), inverse = 1 / n;
  float sum = 0;
#pragma unroll
  for (int j = 0; j < kPacks; ++j)
    if (j < count)
#pragma unroll
      for (int e = 0; e < kElements; ++e) sum += value(j, e);
  const float mean = sum * inverse;
  float deviations = 0, squares = 0;
#pragma unroll
  for (int j = 0; j < kPacks; ++j)
    if (j < count)
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        const float deviation = value(j, e) - mean;
        deviations += deviation;
        squares += deviation * deviation;
      }
  const float rest = deviations * inverse;
  return {n, mean, rest, squares - deviations * rest};
}

// The moments of both sets of values together.
__device__ __forceinline__ Moments merge(const Moments& a, const Moments& b) {
  if (a.count == 0) return b;
  if (b.count == 0) return a;
  const float count = a.count + b.count, share = b.count / count;
  const float delta = (b.mean - a.mean) + (b.rest - a.rest);
  return {count, a.mean, a.rest + delta * share, a.m2 + b.m2 + delta * delta * (a.count * share)};
}

// Merges the moments of `lanes` neighbouring lanes, a power of two up to 32; the first of them gets
// the result. All 32 lanes of the warp take part.
__device__ __forceinline__ Moments merge_lanes(Moments m, int lanes) {
  for (int step = lanes / 2; step > 0; step /= 2) {
    const Moments other{
        __shfl_xor_sync(0xffffffffu, m.count, step), __shfl_xor_sync(0xffffffffu, m.mean, step),
        __shfl_xor_sync(0xffffffffu, m.rest, step), __shfl_xor_sync(0xffffffffu, m.m2, step)};
    m = merge(m, other);
  }
  return m;
}

// Moments of `channels` channels, each held by `rows` threads of a block, in shared memory.
// The rows of a channel are contiguous, padded to an odd number: neighbouring rows, which
// neighbouring threads write, are then in different banks.
struct RowMoments {
  float* shared;  // size(rows, channels) floats
  int rows, channels;

  __host__ __device__ static int size(int rows, int channels) {
    return (rows | 1) * (3 * channels + 1);
  }

  // The count must be that of all channels in the row.
  __device__ __forceinline__ void put(int row, int channel, const Moments& m) const {
    const int plane = (rows | 1) * channels;
    float* at = shared + (rows | 1) * channel + row;
    at[0] = m.mean;
    at[plane] = m.rest;
    at[2 * plane] = m.m2;
    if (channel == 0) shared[3 * plane + row] = m.count;
  }

  // The moments of a channel, after a barrier. Row 0 must not be empty.
  __device__ __forceinline__ Moments merge(int channel) const {
    const int plane = (rows | 1) * channels;
    const float* at = shared + (rows | 1) * channel;
    const float* counts = shared + 3 * plane;
    const float pivot = at[0], first = at[plane];
    float count = 0, sum = 0, m2 = 0;
    for (int r = 0; r < rows; ++r) {
      count += counts[r];
      sum += counts[r] * ((at[r] - pivot) + (at[plane + r] - first));
    }
    const float delta = sum / count;  // the mean of all rows less that of the first
    for (int r = 0; r < rows; ++r) {
      const float deviation = (at[r] - pivot) + (at[plane + r] - first) - delta;
      m2 += at[2 * plane + r] + counts[r] * deviation * deviation;
    }
    return {count, pivot, first + delta, m2};
  }
};

// Stores a channel's moments; `span` points to the span's four planes of `channels` floats.
__device__ __forceinline__ void store_moments(float* span, int64_t channels, int64_t channel,
                                              const Moments& m) {
  const float mean = m.mean + m.rest;
  const float part = mean - m.mean;  // what was added of the rest (Knuth's two-sum)
  store_one(span + channel, m.count);
  store_one(span + channels + channel, mean);
  store_one(span + 2 * channels + channel, (m.mean - (mean - part)) + (m.rest - part));
  store_one(span + 3 * channels + channel, m.m2);
}

}  // namespace fastdiff::cuda
