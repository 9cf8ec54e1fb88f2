// y = x + bias[c] + emb[n, c] + residual, with the statistics of y that the next norm needs.
//
// Reads 1 S and writes 1 S for activations of S bytes, and reads 1 S more with a residual: the
// minimum. The statistics, 16 bytes per channel and span, are computed from the rounded values
// while these are in registers, so that a norm after it reads y once and not twice. Sums are in
// float32 with one rounding. The moments are those of channel_statistics.cuh, merged in an order
// that depends on the shape alone.
//
// Channels-first, `lanes` neighbouring threads take a span of a channel, in batches of kBatch
// vectors each. Channels-last, a block takes a tile of channels, at least 128 bytes of each pixel,
// and a span of pixels: a thread keeps the moments of a vector of channels, and the threads of a
// channel merge their moments through shared memory. Without statistics the spans are chosen here,
// to spread the work over the card. With statistics the caller chooses the spans.
#include <bit>

#include "cuda/access.cuh"
#include "cuda/channel_statistics.cuh"
#include "cuda/conv_epilogue.h"

namespace fastdiff::cuda {
namespace {

constexpr int kBatch = 4;  // vectors that a thread loads before it uses the first

// With at least this many vectors a thread takes several.
constexpr int64_t kSeveralVectors = int64_t{1} << 18;

// Pixels begin..end-1 of span s. With few pixels the last spans are empty.
struct Span {
  int64_t begin, end;

  __device__ __forceinline__ Span(int64_t s, int64_t length, int64_t pixels)
      : begin(min(s * length, pixels)), end(min(begin + length, pixels)) {}
};

// bias[c..] + emb[n, c..] for W channels.
template <int W, class T>
__device__ __forceinline__ void load_added(const ConvEpilogueArgs& a, int64_t n, int64_t c,
                                           float (&added)[W]) {
#pragma unroll
  for (int j = 0; j < W; ++j) added[j] = 0;
  if (a.bias != nullptr) to_floats(load<W>(static_cast<const T*>(a.bias) + c), added);
  if (a.emb != nullptr) {
    float emb[W];
    to_floats(load<W>(static_cast<const T*>(a.emb) + n * a.channels + c), emb);
#pragma unroll
    for (int j = 0; j < W; ++j) added[j] += emb[j];
  }
}

// How many of at, at + stride, ... are below `end`, at most kBatch.
__device__ __forceinline__ int steps_before(int64_t at, int stride, int64_t end) {
  int count = 0;
#pragma unroll
  for (int j = 0; j < kBatch; ++j) count += at + j * stride < end;
  return count;
}

// Computes the vectors at + j * stride of y for j < count, and puts their rounded values into
// `stored`. added(e) is added to element e of a vector.
template <int W, class T, class Added>
__device__ __forceinline__ void add_and_store(const ConvEpilogueArgs& a, int64_t at, int64_t stride,
                                              int count, Added added,
                                              Pack<T, W> (&stored)[kBatch]) {
  const T* x = static_cast<const T*>(a.x) + at;
  const T* residual = static_cast<const T*>(a.residual) + at;
  T* y = static_cast<T*>(a.y) + at;
  Pack<T, W> residuals[kBatch];
#pragma unroll
  for (int j = 0; j < kBatch; ++j)
    if (j < count) stored[j] = load<W>(x + j * stride);
  if (a.residual != nullptr) {
#pragma unroll
    for (int j = 0; j < kBatch; ++j)
      if (j < count) residuals[j] = load<W>(residual + j * stride);
  }
#pragma unroll
  for (int j = 0; j < kBatch; ++j)
    if (j < count) {
      float sum[W];
      to_floats(stored[j], sum);
#pragma unroll
      for (int e = 0; e < W; ++e) sum[e] += added(e);
      if (a.residual != nullptr) {
#pragma unroll
        for (int e = 0; e < W; ++e) sum[e] += to_float(residuals[j].value[e]);
      }
      stored[j] = from_floats<T>(sum);
      store(y + j * stride, stored[j]);
    }
}

// The moments of a channel, from its rows. The first sum has one term per row, and its rounding
// error is computed with the mean that it gives. The error of the squares is negligible.
__device__ __forceinline__ Moments merge_rows(const RowMoments& held, int channel) {
  Moments m = held.merge(channel);
  const int pitch = held.rows | 1, plane = pitch * held.channels;
  const float* means = held.shared + pitch * channel;
  const float* counts = held.shared + 3 * plane;
  float lost = 0;
  for (int r = 0; r < held.rows; ++r)
    lost += counts[r] * ((means[r] - m.mean) + (means[plane + r] - m.rest));
  m.rest += lost / m.count;
  return m;
}

__device__ __forceinline__ float* planes(const ConvEpilogueArgs& a, int64_t n, int64_t s) {
  return a.statistics + (n * a.spans + s) * 4 * a.channels;
}

// Channels-first. blockDim.x, a power of two, is the number of lanes of a channel.
template <class T, int W, bool Statistics>
__global__ void __launch_bounds__(kThreads, 2)
    channels_first_kernel(ConvEpilogueArgs a, int64_t spans, int64_t length, Divisor channels) {
  __shared__ float shared[40];
  const int lanes = static_cast<int>(blockDim.x), lane = static_cast<int>(threadIdx.x);
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const bool inside = row < a.images * a.channels;
  const int64_t n = channels.divide(row), c = row - n * a.channels;
  float added[1] = {0};
  if (inside) load_added<1, T>(a, n, c, added);
#pragma unroll 1
  for (int64_t s = blockIdx.y; s < spans; s += gridDim.y) {
    const Span span(s, length, a.pixels);
    Moments m;
    if (inside) {
#pragma unroll 1
      for (int64_t i = span.begin + lane * W; i < span.end; i += kBatch * lanes * W) {
        const int count = steps_before(i, lanes * W, span.end);
        Pack<T, W> stored[kBatch];
        add_and_store<W, T>(
            a, row * a.pixels + i, lanes * W, count, [&](int) { return added[0]; }, stored);
        if constexpr (Statistics)
          m = merge(m, moments_of<kBatch, W>(
                           count, [&](int j, int e) { return to_float(stored[j].value[e]); }));
      }
    }
    if constexpr (Statistics) {
      m = merge_lanes(m, min(lanes, 32));
      if (lanes > 32) {
        const RowMoments warps{shared, lanes / 32, static_cast<int>(blockDim.y)};
        __syncthreads();
        if (lane % 32 == 0) warps.put(lane / 32, static_cast<int>(threadIdx.y), m);
        __syncthreads();
        if (lane == 0 && span.begin < span.end) m = warps.merge(static_cast<int>(threadIdx.y));
      }
      if (lane == 0 && inside) store_moments(planes(a, n, s), a.channels, c, m);
    }
  }
}

// Channels-last. blockDim is (vectors of channels, pixels). In the grid the `tiles` tiles of
// channels of a span come before those of the next span.
template <class T, int W, bool Statistics>
__global__ void __launch_bounds__(kThreads, 2)
    channels_last_kernel(ConvEpilogueArgs a, int64_t length, unsigned tiles) {
  const int rows = static_cast<int>(blockDim.y), width = static_cast<int>(blockDim.x) * W;
  const unsigned s = blockIdx.x / tiles;
  const int64_t tile = static_cast<int64_t>(blockIdx.x % tiles) * width;
  const int64_t c = tile + threadIdx.x * W;
  const bool inside = c < a.channels;
  const Span span(s, length, a.pixels);
#pragma unroll 1
  for (int64_t n = blockIdx.y; n < a.images; n += gridDim.y) {
    Moments m[W];
    float seen = 0;  // the count of all of them, in one register
    if (inside) {
      float added[W];
      load_added<W, T>(a, n, c, added);
      const int64_t stride = rows * a.channels;
      int64_t at = (n * a.pixels + span.begin + threadIdx.y) * a.channels + c;
#pragma unroll 1
      for (int64_t p = span.begin + threadIdx.y; p < span.end; p += kBatch * rows) {
        const int count = steps_before(p, rows, span.end);
        Pack<T, W> stored[kBatch];
        add_and_store<W, T>(a, at, stride, count, [&](int e) { return added[e]; }, stored);
        at += kBatch * stride;
        if constexpr (Statistics) {
#pragma unroll
          for (int e = 0; e < W; ++e) {
            m[e].count = seen;
            m[e] = merge(m[e], moments_of<kBatch, 1>(count, [&](int j, int) {
                           return to_float(stored[j].value[e]);
                         }));
          }
          seen += static_cast<float>(count);
        }
      }
    }
    if constexpr (Statistics) {
      const RowMoments held{dynamic_shared<float>(), rows, width};
      __syncthreads();
#pragma unroll
      for (int e = 0; e < W; ++e)
        held.put(static_cast<int>(threadIdx.y), static_cast<int>(threadIdx.x) * W + e, m[e]);
      __syncthreads();
      const int threads = static_cast<int>(blockDim.x * blockDim.y);
#pragma unroll 1
      for (int k = static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x); k < width;
           k += threads)
        if (tile + k < a.channels)
          store_moments(planes(a, n, s), a.channels, tile + k,
                        span.begin < span.end ? merge_rows(held, k) : Moments{});
    }
  }
}

template <class T, int W>
void launch_channels_first(const ConvEpilogueArgs& a, Stream stream) {
  const int64_t rows = a.images * a.channels;
  int64_t spans = std::max<int64_t>(a.spans, 1), length = ceil_div(a.pixels, spans);
  const int64_t vectors = ceil_div(length, W);
  const int64_t each = rows * spans * vectors >= kSeveralVectors ? 4 : 1;
  const int64_t wanted =
      std::clamp<int64_t>(vectors / each, std::min<int64_t>(vectors, 8), kThreads);
  const auto lanes = static_cast<int64_t>(std::bit_floor(static_cast<uint64_t>(wanted)));
  if (a.spans == 0) {
    length = lanes * each * W;
    spans = ceil_div(a.pixels, length);
  }
  const auto height = static_cast<unsigned>(kThreads / lanes);
  const dim3 grid(static_cast<unsigned>(ceil_div(rows, height)),
                  static_cast<unsigned>(std::min<int64_t>(spans, 65535)));
  const dim3 block(static_cast<unsigned>(lanes), height);
  if (a.spans > 0)
    FASTDIFF_LAUNCH(channels_first_kernel<T, W, true>, grid, block, 0, stream, a, spans, length,
                    Divisor(a.channels));
  else
    FASTDIFF_LAUNCH(channels_first_kernel<T, W, false>, grid, block, 0, stream, a, spans, length,
                    Divisor(a.channels));
}

template <class T, int W>
void launch_channels_last(const ConvEpilogueArgs& a, Stream stream) {
  const int64_t vectors = a.channels / W;
  int64_t spans = std::max<int64_t>(a.spans, 1), length = ceil_div(a.pixels, spans);
  // Eight vectors are 128 bytes, a cache line. There are more if a block has too few pixels.
  const int64_t most = std::max<int64_t>(8, kThreads / std::min<int64_t>(length, kThreads));
  const int64_t tiles = ceil_div(vectors, most), across = ceil_div(vectors, tiles);
  const int64_t height = std::min(kThreads / across, length);
  if (a.spans == 0) {
    length = height * (a.images * a.pixels * vectors >= kSeveralVectors ? 4 : 1);
    spans = ceil_div(a.pixels, length);
  }
  const dim3 grid(static_cast<unsigned>(tiles * spans),
                  static_cast<unsigned>(std::min<int64_t>(a.images, 65535)));
  const dim3 block(static_cast<unsigned>(across), static_cast<unsigned>(height));
  const auto tile_count = static_cast<unsigned>(tiles);
  if (a.spans > 0) {
    const int size = RowMoments::size(static_cast<int>(height), static_cast<int>(across) * W);
    FASTDIFF_LAUNCH(channels_last_kernel<T, W, true>, grid, block, size * sizeof(float), stream, a,
                    length, tile_count);
  } else {
    FASTDIFF_LAUNCH(channels_last_kernel<T, W, false>, grid, block, 0, stream, a, length,
                    tile_count);
  }
}

}  // namespace

void conv_epilogue_cuda(const ConvEpilogueArgs& a, Stream stream) {
  if (a.images * a.channels * a.pixels == 0) return;
  // With one pixel or one channel both layouts are the same memory: choose the one with vectors.
  const bool channels_last = a.channels > 1 && (a.channels_last || a.pixels == 1);
  for_dtype(a.dtype, [&](auto tag) {
    using T = decltype(tag);
    const int64_t activations = common_alignment(a.x, a.residual, a.y);
    if (channels_last) {
      const int64_t size = a.channels * static_cast<int64_t>(sizeof(T));
      for_width<T>(common_alignment(activations, a.bias, a.emb, size),
                   [&](auto width) { launch_channels_last<T, decltype(width)::value>(a, stream); });
    } else {
      const int64_t pixels = a.spans > 1 ? a.pixels | ceil_div(a.pixels, a.spans) : a.pixels;
      const int64_t size = pixels * static_cast<int64_t>(sizeof(T));
      for_width<T>(common_alignment(activations, size), [&](auto width) {
        launch_channels_first<T, decltype(width)::value>(a, stream);
      });
    }
  });
}

}  // namespace fastdiff::cuda
