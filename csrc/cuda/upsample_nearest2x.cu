// Each pixel of x [N, C, H, W] becomes four of [N, C, 2H, 2W], and backward the sum of four.
//
// Forward reads 1 S and writes 4 S, backward reads 4 S and writes 1 S for small tensors of S bytes:
// the minimum. Sums are in float32, (top left + top right) + (bottom left + bottom right).
//
// The rows of all images (and channels) follow each other, and row r becomes rows 2 r and 2 r + 1
// of twice the width, so images need not be distinguished. Channels-last a thread moves a vector of
// channels of one pixel. Channels-first it takes a vector of a row, which is two vectors when
// doubled. Forward, neighbouring threads first exchange halves, so that the two together store
// whole 32-byte sectors and not every other vector.
#include "cuda/access.cuh"
#include "cuda/upsample_nearest2x.h"

namespace fastdiff::cuda {
namespace {

// `per_row` divides by a row's pixels, or channels-first by its vectors.
//
// The index in the large tensor of the first of the four elements (or pixels) of the element (or
// pixel) `index` of the small tensor, in rows of `width`. The next row is 2 width further.
__device__ __forceinline__ int64_t first_of_four(int64_t index, int64_t row, int64_t width) {
  return 2 * (index + row * width);
}

template <class T, int W>
__global__ void __launch_bounds__(kThreads)
    channels_last_kernel(UpsampleNearest2xArgs a, int64_t pixels, Divisor per_row) {
  const int64_t pixel = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (pixel >= pixels) return;
  const int64_t large = first_of_four(pixel, per_row.divide(pixel), a.width) * a.channels;
  const int64_t below = 2 * a.width * a.channels;
  const T* in = static_cast<const T*>(a.in) + pixel * a.channels;
  T* out = static_cast<T*>(a.out) + large;
  const int64_t stride = static_cast<int64_t>(gridDim.y) * blockDim.x * W;
#pragma unroll 1
  for (int64_t c = (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * W;
       c < a.channels; c += stride) {
    const Pack<T, W> x = load<W>(in + c);
    store(out + c, x);
    store(out + c + a.channels, x);
    store(out + c + below, x);
    store(out + c + below + a.channels, x);
  }
}

template <class T, int W>
__global__ void __launch_bounds__(kThreads)
    channels_last_backward_kernel(UpsampleNearest2xArgs a, int64_t pixels, Divisor per_row) {
  const int64_t pixel = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (pixel >= pixels) return;
  const int64_t large = first_of_four(pixel, per_row.divide(pixel), a.width) * a.channels;
  const int64_t below = 2 * a.width * a.channels;
  const T* in = static_cast<const T*>(a.in) + large;
  T* out = static_cast<T*>(a.out) + pixel * a.channels;
  const int64_t stride = static_cast<int64_t>(gridDim.y) * blockDim.x * W;
#pragma unroll 1
  for (int64_t c = (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * W;
       c < a.channels; c += stride) {
    const Pack<T, W> top_left = load<W>(in + c), top_right = load<W>(in + c + a.channels);
    const Pack<T, W> bottom_left = load<W>(in + c + below),
                     bottom_right = load<W>(in + c + below + a.channels);
    Pack<T, W> sum;
#pragma unroll
    for (int j = 0; j < W; ++j)
      sum.value[j] =
          from_float<T>((to_float(top_left.value[j]) + to_float(top_right.value[j])) +
                        (to_float(bottom_left.value[j]) + to_float(bottom_right.value[j])));
    store(out + c, sum);
  }
}

template <class T, int N>
__device__ __forceinline__ Pack<T, 2 * N> doubled(Pack<T, N> pack) {
  Pack<T, 2 * N> both;
#pragma unroll
  for (int j = 0; j < 2 * N; ++j) both.value[j] = pack.value[j / 2];
  return both;
}

// For rows that are a whole number of full vectors.
template <class T>
__global__ void __launch_bounds__(kThreads)
    channels_first_kernel(UpsampleNearest2xArgs a, int64_t vectors, Divisor per_row) {
  constexpr int W = kWidth<T>, kHalf = W / 2;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const bool odd = index % 2 == 1;
  Pack<T, W> x = {};
  if (index < vectors) x = load<W>(static_cast<const T*>(a.in) + index * W);
  Pack<T, kHalf> low, high;
#pragma unroll
  for (int j = 0; j < kHalf; ++j) {
    low.value[j] = x.value[j];
    high.value[j] = x.value[kHalf + j];
  }
  // The even thread exchanges its high half for the low half of the odd thread. Doubled, the two
  // then hold first the two vectors of the even thread's input, then those of the odd thread's.
  Pack<T, kHalf> other = odd ? low : high;
  uint32_t words[2];
  memcpy(words, &other, sizeof(words));
  for (uint32_t& word : words) word = __shfl_xor_sync(0xffffffffu, word, 1);
  memcpy(&other, words, sizeof(words));
  const Pack<T, kHalf> halves[2] = {odd ? other : low, odd ? high : other};
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    const int64_t source = index - odd + k;
    if (source < vectors) {
      const int64_t row = per_row.divide(source);
      T* out = static_cast<T*>(a.out) + first_of_four(source * W, row, a.width) + odd * W;
      store(out, doubled(halves[k]));
      store(out + 2 * a.width, doubled(halves[k]));
    }
  }
}

// For at most half a vector of a row: doubled it is one store of L elements.
template <class T, int W, int L>
__global__ void __launch_bounds__(kThreads)
    channels_first_narrow_kernel(UpsampleNearest2xArgs a, int64_t vectors, Divisor per_row) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= vectors) return;
  const Pack<T, W> x = load<W>(static_cast<const T*>(a.in) + index * W);
  const int64_t row = per_row.divide(index);
  T* out = static_cast<T*>(a.out) + first_of_four(index * W, row, a.width);
#pragma unroll
  for (int i = 0; i < 2 * W; i += L) {
    Pack<T, L> part;
#pragma unroll
    for (int j = 0; j < L; ++j) part.value[j] = x.value[(i + j) / 2];
    store(out + i, part);
    store(out + 2 * a.width + i, part);
  }
}

// W elements of a row of sums, from 2 W elements of each of two rows, read L at a time.
template <class T, int W, int L>
__global__ void __launch_bounds__(kThreads)
    channels_first_backward_kernel(UpsampleNearest2xArgs a, int64_t vectors, Divisor per_row) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= vectors) return;
  const int64_t row = per_row.divide(index);
  const T* in = static_cast<const T*>(a.in) + first_of_four(index * W, row, a.width);
  T top[2 * W], bottom[2 * W];
#pragma unroll
  for (int i = 0; i < 2 * W; i += L) {
    const Pack<T, L> above = load<L>(in + i), below = load<L>(in + 2 * a.width + i);
#pragma unroll
    for (int j = 0; j < L; ++j) {
      top[i + j] = above.value[j];
      bottom[i + j] = below.value[j];
    }
  }
  Pack<T, W> sum;
#pragma unroll
  for (int j = 0; j < W; ++j)
    sum.value[j] = from_float<T>((to_float(top[2 * j]) + to_float(top[2 * j + 1])) +
                                 (to_float(bottom[2 * j]) + to_float(bottom[2 * j + 1])));
  store(static_cast<T*>(a.out) + index * W, sum);
}

struct PixelPlan {
  int64_t pixels;
  dim3 grid, block;

  PixelPlan(const UpsampleNearest2xArgs& a, int width) : pixels(a.images * a.height * a.width) {
    const int64_t vectors = a.channels / width, tiles = ceil_div(vectors, kThreads);
    const int64_t across = ceil_div(vectors, tiles);
    const int64_t high = std::min(kThreads / across, pixels);
    block = dim3(static_cast<unsigned>(across), static_cast<unsigned>(high));
    grid = dim3(static_cast<unsigned>(ceil_div(pixels, high)),
                static_cast<unsigned>(std::min<int64_t>(tiles, 65535)));
  }
};

dim3 blocks_for(int64_t vectors) {
  return dim3(static_cast<unsigned>(ceil_div(vectors, kThreads)));
}

// Calls f with the number of elements that a thread takes of the small tensor, and the number in an
// access to the large one: the same for whole vectors, else twice as many (2 width is so aligned),
// or one.
template <class T, class F>
void for_widths(const void* small, const void* large, int64_t width, F f) {
  const int64_t row = width * static_cast<int64_t>(sizeof(T));
  const int64_t in_large = common_alignment(large, 2 * row);
  const int64_t alignment =
      std::min(common_alignment(small, row), in_large == 16 ? 16 : in_large / 2);
  using One = std::integral_constant<int, 1>;
  if (alignment < static_cast<int64_t>(sizeof(T))) return f(One{}, One{});
  for_width<T>(alignment, [&](auto w) {
    constexpr int W = decltype(w)::value;
    f(w, std::integral_constant<int, W == kWidth<T> ? W : 2 * W>{});
  });
}

template <class T>
void forward(const UpsampleNearest2xArgs& a, Stream stream) {
  if (a.channels_last && a.channels > 1) {
    const int64_t size = a.channels * static_cast<int64_t>(sizeof(T));
    return for_width<T>(common_alignment(a.in, a.out, size), [&](auto width) {
      constexpr int W = decltype(width)::value;
      const PixelPlan plan(a, W);
      FASTDIFF_LAUNCH(channels_last_kernel<T, W>, plan.grid, plan.block, 0, stream, a, plan.pixels,
                      Divisor(a.width));
    });
  }
  const int64_t elements = a.images * a.channels * a.height * a.width;
  for_widths<T>(a.in, a.out, a.width, [&](auto small, auto large) {
    constexpr int W = decltype(small)::value, L = decltype(large)::value;
    const int64_t vectors = elements / W;
    if constexpr (W == kWidth<T>)
      FASTDIFF_LAUNCH(channels_first_kernel<T>, blocks_for(vectors), kThreads, 0, stream, a,
                      vectors, Divisor(a.width / W));
    else
      FASTDIFF_LAUNCH(channels_first_narrow_kernel<T, W, L>, blocks_for(vectors), kThreads, 0,
                      stream, a, vectors, Divisor(a.width / W));
  });
}

template <class T>
void backward(const UpsampleNearest2xArgs& a, Stream stream) {
  if (a.channels_last && a.channels > 1) {
    const int64_t size = a.channels * static_cast<int64_t>(sizeof(T));
    return for_width<T>(common_alignment(a.in, a.out, size), [&](auto width) {
      constexpr int W = decltype(width)::value;
      const PixelPlan plan(a, W);
      FASTDIFF_LAUNCH(channels_last_backward_kernel<T, W>, plan.grid, plan.block, 0, stream, a,
                      plan.pixels, Divisor(a.width));
    });
  }
  const int64_t elements = a.images * a.channels * a.height * a.width;
  for_widths<T>(a.out, a.in, a.width, [&](auto small, auto large) {
    constexpr int W = decltype(small)::value, L = decltype(large)::value;
    FASTDIFF_LAUNCH(channels_first_backward_kernel<T, W, L>, blocks_for(elements / W), kThreads, 0,
                    stream, a, elements / W, Divisor(a.width / W));
  });
}

bool empty(const UpsampleNearest2xArgs& a) {
  return a.images * a.channels * a.height * a.width == 0;
}

}  // namespace

void upsample_nearest2x_cuda(const UpsampleNearest2xArgs& a, Stream stream) {
  if (empty(a)) return;
  if (size_of(a.dtype) == 4)  // values are only moved
    forward<uint32_t>(a, stream);
  else
    forward<uint16_t>(a, stream);
}

void upsample_nearest2x_backward_cuda(const UpsampleNearest2xArgs& a, Stream stream) {
  if (empty(a)) return;
  for_dtype(a.dtype, [&](auto tag) { backward<decltype(tag)>(a, stream); });
}

}  // namespace fastdiff::cuda
