// The two kernels of denoising_loss over units of elements, whose noise is given or drawn, and how
// the first divides the work. A plan follows from shapes and alignment alone, never from the
// device.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <type_traits>

#include "cuda/access.cuh"
#include "cuda/denoising_loss.h"
#include "cuda/drawn_unit.cuh"

namespace fastdiff::cuda {

// Images that are walked flat: Each vectors of W elements, a team's width apart.
struct FlatImage {
  int64_t units;  // vectors
};
template <class T, int W, int Each>
struct FlatUnit {
  static constexpr int kVectors = Each;
  int64_t unit, team, units;

  __device__ __forceinline__ FlatUnit(const FlatImage& image, int64_t unit, int team)
      : unit(unit), team(team), units(image.units) {}
  __device__ __forceinline__ int64_t at(int v) const { return (unit + v * team) * W; }
  __device__ __forceinline__ bool inside(int v) const { return unit + v * team < units; }
};

// What a kernel needs to know of its units: Form is that of DrawnUnit, or Each of FlatUnit.
template <class T, int W, bool Drawn, int Form>
struct Units {
  using Image = std::conditional_t<Drawn, DrawnImage, FlatImage>;
  using Unit = std::conditional_t<Drawn, DrawnUnit<T, W, Form>, FlatUnit<T, W, Form>>;
  static constexpr int kEach = Drawn ? 1 : Form;  // units of the image that one stands for

  static __device__ __forceinline__ Unit unit(const Image& image, int64_t unit, int team) {
    if constexpr (Drawn)
      return Unit(image, unit);
    else
      return Unit(image, unit, team);
  }
};

struct NoStream {
  __device__ __forceinline__ NoStream(const int64_t*, uint32_t) {}
};

// Image n, and what its timestep makes of it: NaN where that is unknown.
template <class T, int W, bool Drawn>
struct LossImage {
  const T *prediction, *x0, *noise;
  float p, q, weight;
  std::conditional_t<Drawn, PhiloxStream, NoStream> stream;

  __device__ __forceinline__ LossImage(const DenoisingLossArgs& a, int64_t n)
      : stream(Drawn ? a.seed + 2 * n : nullptr,
               Drawn ? static_cast<uint32_t>(load_one(a.row)) : 0) {
    const int64_t offset = n * a.channels * a.pixels;
    prediction = static_cast<const T*>(a.prediction) + offset;
    x0 = a.x0 ? static_cast<const T*>(a.x0) + offset : nullptr;
    noise = a.noise ? static_cast<const T*>(a.noise) + offset : nullptr;
    const int64_t t = load_one(a.t + n);
    weight = __int_as_float(0x7fffffff);
    p = q = 0;
    if (t >= 0 && t < a.steps) {
      weight = load_one(a.weight + t);
      if (x0) p = load_one(a.target_x0 + t);
      if (Drawn || noise) q = load_one(a.target_noise + t);
    }
  }

  // prediction - p x0 - q z of the unit's vectors that are inside.
  template <class Unit>
  __device__ __forceinline__ void differences(const Unit& unit,
                                              float (&d)[Unit::kVectors][W]) const {
    constexpr int kVectors = Unit::kVectors;
    Pack<T, W> y[kVectors], x[kVectors], given[kVectors];
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (!unit.inside(v)) continue;
      y[v] = load<W>(prediction + unit.at(v));
      if (x0) x[v] = load<W>(x0 + unit.at(v));
      if (!Drawn && noise) given[v] = load<W>(noise + unit.at(v));
    }
    float z[kVectors][W];
    if constexpr (Drawn) unit.draw(stream, z);
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (!unit.inside(v)) continue;
#pragma unroll
      for (int j = 0; j < W; ++j) {
        d[v][j] = to_float(y[v].value[j]);
        if (x0) d[v][j] = __fmaf_rn(-p, to_float(x[v].value[j]), d[v][j]);
        if (Drawn)
          d[v][j] = __fmaf_rn(-q, z[v][j], d[v][j]);
        else if (noise)
          d[v][j] = __fmaf_rn(-q, to_float(given[v].value[j]), d[v][j]);
      }
    }
  }
};

// A team of threads takes a piece of an image, `length` units; a team is lanes of one warp, a power
// of two, or else a whole block.
struct LossPlan {
  int64_t pieces;     // of an image
  Divisor per_image;  // divides by them
  int64_t length;
  int team, threads;
  dim3 grid;
};

__device__ __forceinline__ float image_loss(float weight, float squares, int64_t size) {
  return weight * (squares / static_cast<float>(size));
}

// The losses [images] where a team has a whole image, else the sums of squares [images, pieces].
// One block a processor is asked for, not because there would be no more, but because the compiler
// spills registers to make room for them.
template <class T, int W, bool Drawn, int Form>
__global__ void __launch_bounds__(kThreads, 1)
    denoising_loss_kernel(DenoisingLossArgs a, typename Units<T, W, Drawn, Form>::Image shape,
                          LossPlan plan, float* out) {
  using U = Units<T, W, Drawn, Form>;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % plan.team;
  const int64_t teams = blockDim.x / plan.team;  // of a block
  const int64_t place = blockIdx.x * teams + thread / plan.team;
  const int64_t n = plan.per_image.divide(place), piece = place - n * plan.pieces;
  float sum = 0, weight = 0;
  if (n < a.images) {
    const LossImage<T, W, Drawn> image(a, n);
    weight = image.weight;
    const int64_t begin = piece * plan.length;
    const int64_t end = begin + plan.length < shape.units ? begin + plan.length : shape.units;
#pragma unroll 1
    for (int64_t i = begin + lane; i < end; i += plan.team * U::kEach) {
      const auto unit = U::unit(shape, i, plan.team);
      constexpr int kVectors = U::Unit::kVectors;
      float d[kVectors][W], part = 0;
      image.differences(unit, d);
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        if (!unit.inside(v)) continue;
#pragma unroll
        for (int j = 0; j < W; ++j) part = __fmaf_rn(d[v][j], d[v][j], part);
      }
      sum += part;
    }
  }
  if (plan.team > 32) {
    sum = block_sum(sum);
  } else {
    for (int lanes = plan.team / 2; lanes > 0; lanes /= 2)
      sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
  }
  if (lane != 0 || n >= a.images) return;
  store_one(out + place, plan.pieces > 1 ? sum : image_loss(weight, sum, a.channels * a.pixels));
}

template <class T, int W, bool Drawn, int Form>
__global__ void __launch_bounds__(kThreads)
    denoising_loss_backward_kernel(DenoisingLossArgs a,
                                   typename Units<T, W, Drawn, Form>::Image shape,
                                   const float* grad, void* dprediction) {
  using U = Units<T, W, Drawn, Form>;
  const int team = static_cast<int>(blockDim.x);
  const int64_t i = static_cast<int64_t>(blockIdx.x) * team * U::kEach + threadIdx.x;
  if (i >= shape.units) return;
  const auto unit = U::unit(shape, i, team);
  const int64_t size = a.channels * a.pixels;
#pragma unroll 1
  for (int64_t n = blockIdx.y; n < a.images; n += gridDim.y) {
    const LossImage<T, W, Drawn> image(a, n);
    constexpr int kVectors = U::Unit::kVectors;
    float d[kVectors][W];
    image.differences(unit, d);
    const float factor = load_one(grad + n) * (2 * image.weight / static_cast<float>(size));
    T* out = static_cast<T*>(dprediction) + n * size;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (!unit.inside(v)) continue;
#pragma unroll
      for (int j = 0; j < W; ++j) d[v][j] *= factor;
      store(out + unit.at(v), from_floats<T>(d[v]));
    }
  }
}

// Pieces of an image, at most: 1 where a block reads it in little more time than another kernel
// takes to start, or where the images are enough for all processors; else four blocks a processor.
inline int64_t most_pieces(const DenoisingLossArgs& a) {
  constexpr double kCard = 3e6, kAlone = 5e4;       // bytes a microsecond: the card's, one block's
  constexpr double kLaunch = 2;                     // microseconds
  constexpr int64_t kProcessors = 132, kDrawn = 8;  // bytes that take as long as drawing an element
  const int64_t read = 1 + (a.x0 != nullptr) + (a.noise != nullptr);
  const int64_t element = read * size_of(a.dtype) + (a.seed ? kDrawn : 0);
  const auto share = static_cast<double>(a.channels * a.pixels * element);
  const double all = static_cast<double>(a.images) * share / kCard;
  const double alone = static_cast<double>(ceil_div(a.images, kProcessors)) * share / kAlone;
  return std::max(all, alone) <= all + kLaunch ? 1 : ceil_div(4 * kProcessors, a.images);
}

inline LossPlan loss_plan(int64_t images, int64_t units, int64_t most, int each) {
  const int64_t wanted = ceil_div(ceil_div(units, most), each);  // threads for a piece
  const int64_t team = wanted > 32 ? std::min<int64_t>(kThreads, ceil_div(wanted, 32) * 32)
                                   : std::bit_ceil(static_cast<uint64_t>(wanted));
  const int64_t length = ceil_div(wanted, team) * team * each, pieces = ceil_div(units, length);
  const int64_t threads = images * pieces * team;
  const int64_t block = team > 32 ? team : threads < kManyVectors / 8 ? 64 : kThreads;
  const int64_t blocks = std::min<int64_t>(ceil_div(threads, block), 0xffffffff);
  return {pieces,
          Divisor(pieces),
          length,
          static_cast<int>(team),
          static_cast<int>(block),
          dim3(static_cast<unsigned>(blocks))};
}

// The first kernel; `out` is the losses, or what most_pieces sums of each image need. Gives the
// pieces that there are.
template <class T, int W, bool Drawn, int Form, class Image>
int64_t launch_loss(const DenoisingLossArgs& a, const Image& image, int64_t pieces, float* loss,
                    float* sums, Stream stream) {
  const LossPlan plan = loss_plan(a.images, image.units, pieces, Units<T, W, Drawn, Form>::kEach);
  FASTDIFF_LAUNCH(denoising_loss_kernel<T, W, Drawn, Form>, plan.grid, plan.threads, 0, stream, a,
                  image, plan, plan.pieces > 1 ? sums : loss);
  return plan.pieces;
}

template <class T, int W, bool Drawn, int Form, class Image>
void launch_backward(const DenoisingLossArgs& a, const Image& image, const float* grad,
                     void* dprediction, Stream stream) {
  const FlatPlan plan = flat_plan(image.units, a.images, Units<T, W, Drawn, Form>::kEach);
  FASTDIFF_LAUNCH(denoising_loss_backward_kernel<T, W, Drawn, Form>, plan.grid, plan.threads, 0,
                  stream, a, image, grad, dprediction);
}

// Those of denoising_loss_from_seed.cu.
int64_t loss_from_seed(const DenoisingLossArgs& a, int64_t pieces, float* loss, float* sums,
                       Stream stream);
void loss_from_seed_backward(const DenoisingLossArgs& a, const float* grad, void* dprediction,
                             Stream stream);

}  // namespace fastdiff::cuda
