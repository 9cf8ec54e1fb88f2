// Shared by the kernels of group_norm_silu and its backward: which elements a thread holds, sums
// over threads, and the coefficients of a channel.
//
// A block works on a tile of an image: some channels by some pixels. Each of its threads holds
// kPieces * kSlots packs of W neighbouring elements in registers.
//
//   channels-first: a channel is cut into pieces of lanes * slots packs; a team of `lanes` threads
//     (a power of two up to 32) takes kPieces pieces, each of one channel.
//   channels-last: a row of the tile is `lanes` packs of channels of one pixel; `rows` rows are
//     taken at a time, so that a thread has the same W channels in each of its pixels.
//
// In both layouts a thread's elements are kRuns runs, each of one channel: its pieces, or the W
// elements of its packs. Tiles are cut along channels, not groups, so that packs are whole for any
// number of channels per group.
#pragma once

#include "cuda/device.cuh"

namespace fastdiff::cuda {

constexpr int kTileThreads = 512;   // the most in a block that keeps whole groups on the chip
constexpr int kSplitThreads = 256;  // in a block of a split kernel

struct Tiling {
  int channels, per_group, pixels;  // C = C1 + C2, C / G, P
  int lanes;                        // see above
  int rows;                         // channels-first: pieces of a channel; channels-last: see above
  int slots;                        // that are in use, up to kSlots
  int tiles;                        // of an image: on the chip, or channels-last along the channels
  int spans;                        // parts of the pixels, each with statistics of its own
  int groups;                       // in a tile, on the chip
};

// Two tensors that are used as one, concatenated along the channels.
template <class T>
struct Joined {
  T* first;
  T* second;
  int64_t first_channels, second_channels;
};

template <class T, class Args>
__device__ __forceinline__ Joined<const T> inputs(const Args& a) {
  return {static_cast<const T*>(a.x), static_cast<const T*>(a.skip), a.channels, a.skip_channels};
}

// The addresses of a thread's packs: the pack of slot j is at base + j * step.
template <class T, bool kLast>
struct Places {
  T* base;
  std::conditional_t<kLast, int64_t, int> step;
};

// Slot j begins at pixel + j * step; `count` slots have elements. Channels-last, `channel` is the
// first of W channels.
struct Piece {
  int channel, pixel, step, count;
  int part;  // channels-first: which of the channel's pieces

  // Its addresses in a tensor of all channels, and in two concatenated tensors.
  template <bool kLast, class T>
  __device__ __forceinline__ Places<T, kLast> in(T* x, int64_t image, const Tiling& t) const {
    return in<kLast>(x, image, t, t.channels, channel);
  }
  template <bool kLast, class T>
  __device__ __forceinline__ Places<T, kLast> in(const Joined<T>& x, int64_t image,
                                                 const Tiling& t) const {
    const bool second = channel >= x.first_channels;
    T* from = second ? x.second : x.first;
#ifndef FASTDIFF_EMULATE
    __builtin_assume(__isGlobal(from));  // the choice hides this from the compiler
#endif
    return in<kLast>(from, image, t, second ? x.second_channels : x.first_channels,
                     channel - (second ? x.first_channels : 0));
  }

 private:
  template <bool kLast, class T>
  __device__ __forceinline__ Places<T, kLast> in(T* x, int64_t image, const Tiling& t,
                                                 int64_t channels, int64_t c) const {
    if constexpr (kLast) {
      return {x + (image * t.pixels + pixel) * channels + c, step * channels};
    } else {
      return {x + (image * channels + c) * t.pixels + pixel, step};
    }
  }
};

// The value, hidden from the compiler's analysis. Results that depend on it are then computed
// again, where the compiler would otherwise keep an earlier result in a register.
__device__ __forceinline__ int anew(int value) {
#ifndef FASTDIFF_EMULATE
  asm volatile("" : "+r"(value));
#endif
  return value;
}

// Makes the compiler unpack 16-bit elements again from here on. Otherwise it keeps the unpacked
// elements of one pass for the next pass, which takes twice the registers.
template <class T, int W, int kPieces, int kSlots>
__device__ __forceinline__ void unpack_anew(Pack<T, W> (&packs)[kPieces][kSlots]) {
#ifndef FASTDIFF_EMULATE
  if constexpr (sizeof(T) == 2 && W == kWidth<T>)
#pragma unroll
    for (int i = 0; i < kPieces; ++i)
#pragma unroll
      for (int j = 0; j < kSlots; ++j) {
        uint4 word;
        memcpy(&word, &packs[i][j], sizeof(word));
        asm volatile("" : "+r"(word.x), "+r"(word.y), "+r"(word.z), "+r"(word.w));
        memcpy(&packs[i][j], &word, sizeof(word));
      }
#else
  (void)packs;
#endif
}

// How many blocks of kTileThreads a multiprocessor should hold, for kPacks packs per thread. The
// registers decide; channels-last, 16-bit packs also need the coefficients of eight channels.
template <class T, bool kLast, int kPacks>
constexpr int blocks_at_once() {
  return kPacks <= 4 && !(kLast && sizeof(T) == 2) ? 2 : 1;
}

template <class T, int W, int kPieces, int kSlots, bool kChannelsLast>
struct Tile {
  static_assert(!kChannelsLast || kPieces == 1);
  static constexpr bool kLast = kChannelsLast;
  static constexpr int kRuns = kLast ? W : kPieces;
  static constexpr int kCoefficients = kLast ? W : 1;  // channels in a pack
  using Packs = Pack<T, W>[kPieces][kSlots];

  Piece pieces[kPieces];
  int row = -1;  // channels-last: which of the rows taken at a time, or -1 in an idle thread

  // Two tiles of the same arguments are the same, but share no registers.
  //
  // Channels-first: the pieces from number `piece` on of the channels first..first+channels-1.
  // Channels-last: the rows from pixel `begin` on of these channels, as many as are taken at a
  // time.
  __device__ __forceinline__ Tile(const Tiling& t, int first, int channels, int piece, int begin) {
    const int thread = anew(static_cast<int>(threadIdx.x)), team = thread / t.lanes;
    const int lane = thread - team * t.lanes;
    const auto count = [&](int pixel, int step) {
      const int slots = pixel < t.pixels ? (t.pixels - pixel + step - 1) / step : 0;
      return slots < t.slots ? slots : t.slots;
    };
    if constexpr (kLast) {
      pieces[0] = {first, begin + team, t.rows, 0, 0};
      if (team < t.rows && lane * W < channels) {
        row = team;
        pieces[0].channel += lane * W;
        pieces[0].count = count(begin + team, t.rows);
      }
    } else {
      const int teams = static_cast<int>(blockDim.x) / t.lanes;
#pragma unroll
      for (int i = 0; i < kPieces; ++i) {
        const int index = piece + i * teams + team;
        const int channel = index / t.rows, part = index - channel * t.rows;
        const int pixel = (part * t.slots * t.lanes + lane) * W, step = t.lanes * W;
        pieces[i] = {first, pixel, step, 0, part};
        if (channel < channels) {
          pieces[i].channel += channel;
          pieces[i].count = count(pixel, step);
        }
      }
    }
  }

  __device__ __forceinline__ const Piece& piece(int run) const { return pieces[kLast ? 0 : run]; }
  __device__ __forceinline__ int channel(int run) const {
    return piece(run).channel + (kLast ? run : 0);
  }
  __device__ __forceinline__ int elements(int run) const {
    return piece(run).count * (kLast ? 1 : W);
  }

  // x is two concatenated tensors, or one tensor of all channels.
  template <class X>
  __device__ __forceinline__ void read(const X& x, int64_t image, const Tiling& t,
                                       Packs& packs) const {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const auto at = pieces[i].template in<kLast>(x, image, t);
#pragma unroll
      for (int j = 0; j < kSlots; ++j) {
        packs[i][j] = {};
        if (j < pieces[i].count) packs[i][j] = load<W>(at.base + j * at.step);
      }
    }
  }

  // Calls f(piece, slot, element) for the elements of a run.
  template <class F>
  __device__ __forceinline__ void each(int run, F&& f) const {
#pragma unroll
    for (int j = 0; j < kSlots; ++j)
      if (j < piece(run).count) {
        if constexpr (kLast) {
          f(0, j, run);
        } else {
#pragma unroll
          for (int e = 0; e < W; ++e) f(run, j, e);
        }
      }
  }
};

// The part of the work of block `b` of a split kernel: the arguments of its Tile.
struct Part {
  int64_t image;
  int first, channels, piece, begin, span;

  __device__ __forceinline__ Part(const Tiling& t, bool last, int width, int64_t b) {
    first = 0, channels = t.channels, piece = 0, begin = 0, span = 0;
    const int index = static_cast<int>(b % t.tiles);
    b /= t.tiles;
    if (last) {
      span = static_cast<int>(b % t.spans);
      b /= t.spans;
      first = index * t.lanes * width;
      channels = min(t.lanes * width, t.channels - first);
      begin = span * t.rows * t.slots;
    } else {
      piece = index * (static_cast<int>(blockDim.x) / t.lanes);
    }
    image = b;
  }
};

// The kCount neighbouring values at `from` in shared memory.
template <int kCount>
__device__ __forceinline__ void read_floats(const float* from, float (&value)[kCount]) {
  constexpr int kPack = kCount % 4 == 0 ? 4 : 1;
#pragma unroll
  for (int i = 0; i < kCount; i += kPack) {
    const auto pack = *reinterpret_cast<const Pack<float, kPack>*>(from + i);
#pragma unroll
    for (int k = 0; k < kPack; ++k) value[i + k] = pack.value[k];
  }
}

// Coefficients of the channels of a block of a split kernel, plane by plane in shared memory:
// channels-last of the tile's channels, channels-first of the single channel of each team. So they
// are read once per block or team, not by each thread.
struct SplitCoefficients {
  float* planes;
  int stride;  // from one plane to the next
  int first;   // channel c of this thread's piece is at c - first

  template <class Tile>
  __device__ __forceinline__ SplitCoefficients(const Tile& tile, const Tiling& t, const Part& part)
      : planes(dynamic_shared<float>()), stride(size(t, Tile::kLast, Tile::kCoefficients)) {
    const int team = static_cast<int>(threadIdx.x) / t.lanes;
    first = Tile::kLast ? part.first : tile.pieces[0].channel - team;
  }

  // Calls put(channel, at) in one thread per channel; `at` is the place of its values.
  template <class Tile, class Put>
  __device__ __forceinline__ void fill(const Tile& tile, const Tiling& t, const Part& part,
                                       Put&& put) const {
    if constexpr (Tile::kLast) {
      for (int c = static_cast<int>(threadIdx.x); c < part.channels;
           c += static_cast<int>(blockDim.x))
        put(first + c, planes + c);
    } else {
      const int channel = tile.pieces[0].channel;
      if (static_cast<int>(threadIdx.x) % t.lanes == 0) put(channel, planes + (channel - first));
    }
    __syncthreads();
  }

  __host__ __device__ static int size(const Tiling& t, bool last, int width) {  // floats of a plane
    return last ? t.lanes * width : kSplitThreads / t.lanes;
  }
  static size_t bytes(const Tiling& t, bool last, int width, int count) {  // of `count` planes
    return count * size(t, last, width) * sizeof(float);
  }
};

// The sum over `lanes` neighbouring lanes (a power of two), to all of them.
template <class T>
__device__ __forceinline__ T lanes_sum(T value, int lanes) {
  for (int step = lanes / 2; step > 0; step /= 2)
    value += __shfl_xor_sync(0xffffffffu, value, step);
  return value;
}

// How many neighbouring lanes compute each of `sums` sums: a power of two that divides a warp.
__device__ __forceinline__ int lanes_for(int sums) {
  int lanes = 32;
  while (lanes > 1 && sums * lanes > static_cast<int>(blockDim.x)) lanes /= 2;
  return lanes;
}

// The value to be normalised is x + add. The value before SiLU is normalised * gain + offset.
struct Affine {
  float add, gain, offset, grow, weight, bias;  // grow = 1 + scale

  template <class T, class Args>
  __device__ __forceinline__ static Affine of(const Args& a, const Tiling& t, int64_t image,
                                              int64_t channel, const T*) {
    const auto get = [](const void* from, int64_t index, float missing) {
      return from ? to_float(load_one(static_cast<const T*>(from) + index)) : missing;
    };
    const int64_t index = image * t.channels + channel;
    Affine f;
    f.weight = get(a.weight, channel, 1), f.bias = get(a.bias, channel, 0);
    f.add = get(a.add, index, 0);
    const double grow = 1 + static_cast<double>(get(a.scale, index, 0));
    f.grow = static_cast<float>(grow);
    f.gain = static_cast<float>(f.weight * grow);
    f.offset = static_cast<float>(f.bias * grow + get(a.shift, index, 0));
    return f;
  }
};

// A channel in terms of x: normalised = (x - center) * rstd + rest, and the value before SiLU is
// (x - center) * gain + offset. `center` is mean - add rounded: subtracting it first is exact where
// x is near the mean, so that a large mean costs no accuracy; `rest` is what the rounding left out.
struct Coefficients {
  float center, gain, offset, rest;

  __device__ __forceinline__ Coefficients(float add, float scale, float shift, double mean,
                                          double rstd) {
    const double m = mean - add;
    center = static_cast<float>(m);
    const double left_out = (center - m) * rstd;
    rest = static_cast<float>(left_out);
    gain = static_cast<float>(rstd * scale);
    offset = static_cast<float>(left_out * scale + shift);
  }
};

// 1 / (1 + e^-z). Where e^-z overflows the result is 0, which is right.
__device__ __forceinline__ float sigmoid(float z) { return __fdividef(1, 1 + __expf(-z)); }

}  // namespace fastdiff::cuda
