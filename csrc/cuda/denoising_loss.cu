// loss_n = weight[t] mean((prediction - target_x0[t] x0 - target_noise[t] z)^2) of each image n,
// and its gradient in the prediction. The noise z is given, or computed here from a seed.
//
// With x0 and z given, forward reads 3 S for images of S bytes, backward reads 3 S and writes 1 S,
// the minimum. A tensor that is not given is not read. All tensors have the same memory layout, and
// are walked flat.
//
// With noise from a seed, forward and backward read 1 S less: the noise is never in memory, and no
// kernel has to write it. A value of noise takes about 55 instructions, so arithmetic is as likely
// a limit as memory. noise_unit.cuh says which elements a thread takes.
//
// Forward is one kernel where a block takes a whole image, or a part of a warp a small image. An
// image is cut into pieces if a block would take longer to read it than another kernel takes to
// start, while most processors are idle. A second kernel then adds up the pieces' sums of squares.
// Each thread adds up squares vector by vector, then lanes and warps are added in a tree: float32
// suffices for that, and the order depends on shapes alone. Plans depend on shapes and alignment,
// never on the device.
#include <algorithm>
#include <bit>
#include <cstdint>
#include <type_traits>

#include "cuda/access.cuh"
#include "cuda/denoising_loss.h"
#include "cuda/noise_unit.cuh"

namespace fastdiff::cuda {
namespace {

enum class Noise { Given, FromSeed };  // Given: z is 0 where the pointer is null

// A unit of images that are walked flat: Each vectors of W elements, a team's width apart.
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

// The units of an image: FlatUnit, whose Each is Form, or NoiseUnit.
template <class T, int W, Noise kNoise, int Form>
struct Units {
  static constexpr bool kSeeded = kNoise == Noise::FromSeed;
  using Image = std::conditional_t<kSeeded, NoiseImage, FlatImage>;
  using Unit = std::conditional_t<kSeeded, NoiseUnit<T, W, Form>, FlatUnit<T, W, Form>>;
  static constexpr int kEach = kSeeded ? 1 : Form;  // units of the image in one Unit

  static __device__ __forceinline__ Unit unit(const Image& image, int64_t unit, int team) {
    if constexpr (kSeeded)
      return Unit(image, unit);
    else
      return Unit(image, unit, team);
  }
};

struct NoStream {
  __device__ __forceinline__ NoStream(const int64_t*, uint32_t) {}
};

// The pointers and coefficients of image n. The weight is NaN where its timestep is unknown.
template <class T, int W, Noise kNoise>
struct LossImage {
  static constexpr bool kSeeded = kNoise == Noise::FromSeed;
  const T *prediction, *x0, *noise;
  float p, q, weight;
  std::conditional_t<kSeeded, PhiloxStream, NoStream> stream;

  __device__ __forceinline__ LossImage(const DenoisingLossArgs& a, int64_t n)
      : stream(kSeeded ? a.seed + 2 * n : nullptr,
               kSeeded ? static_cast<uint32_t>(load_one(a.row)) : 0) {
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
      if (kSeeded || noise) q = load_one(a.target_noise + t);
    }
  }

  // prediction - p x0 - q z of the vectors of the unit that are inside the image.
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
      if (!kSeeded && noise) given[v] = load<W>(noise + unit.at(v));
    }
    float z[kVectors][W];
    if constexpr (kSeeded) unit.fill(stream, z);
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (!unit.inside(v)) continue;
#pragma unroll
      for (int j = 0; j < W; ++j) {
        d[v][j] = to_float(y[v].value[j]);
        if (x0) d[v][j] = __fmaf_rn(-p, to_float(x[v].value[j]), d[v][j]);
        if (kSeeded)
          d[v][j] = __fmaf_rn(-q, z[v][j], d[v][j]);
        else if (noise)
          d[v][j] = __fmaf_rn(-q, to_float(given[v].value[j]), d[v][j]);
      }
    }
  }
};

// A team of threads takes a piece of an image. A team is a power of two of lanes of one warp, or
// else a whole block.
struct LossPlan {
  int64_t pieces;     // in an image
  Divisor per_image;  // divides by `pieces`
  int64_t length;     // units in a piece
  int team, threads;
  dim3 grid;
};

__device__ __forceinline__ float image_loss(float weight, float squares, int64_t size) {
  return weight * (squares / static_cast<float>(size));
}

// The losses [images] where a team has a whole image, else the sums of squares [images, pieces].
// The launch bounds ask for one block per processor, though more fit: if asked for more, the
// compiler spills registers.
template <class T, int W, Noise kNoise, int Form>
__global__ void __launch_bounds__(kThreads, 1)
    denoising_loss_kernel(DenoisingLossArgs a, typename Units<T, W, kNoise, Form>::Image shape,
                          LossPlan plan, float* out) {
  using U = Units<T, W, kNoise, Form>;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % plan.team;
  const int64_t teams = blockDim.x / plan.team;  // of a block
  const int64_t place = blockIdx.x * teams + thread / plan.team;
  const int64_t n = plan.per_image.divide(place), piece = place - n * plan.pieces;
  float sum = 0, weight = 0;
  if (n < a.images) {
    const LossImage<T, W, kNoise> image(a, n);
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

template <class T, int W, Noise kNoise, int Form>
__global__ void __launch_bounds__(kThreads)
    denoising_loss_backward_kernel(DenoisingLossArgs a,
                                   typename Units<T, W, kNoise, Form>::Image shape,
                                   const float* grad, void* dprediction) {
  using U = Units<T, W, kNoise, Form>;
  const int team = static_cast<int>(blockDim.x);
  const int64_t i = static_cast<int64_t>(blockIdx.x) * team * U::kEach + threadIdx.x;
  if (i >= shape.units) return;
  const auto unit = U::unit(shape, i, team);
  const int64_t size = a.channels * a.pixels;
#pragma unroll 1
  for (int64_t n = blockIdx.y; n < a.images; n += gridDim.y) {
    const LossImage<T, W, kNoise> image(a, n);
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

// The most pieces of an image: 1 where a block reads it in little more time than another kernel
// takes to start, or where there are enough images for all processors; else as many as give four
// blocks per processor.
int64_t most_pieces(const DenoisingLossArgs& a) {
  constexpr double kCard = 3e6, kAlone = 5e4;  // bytes per microsecond: of the card, of one block
  constexpr double kLaunch = 2;                // microseconds
  constexpr int64_t kProcessors = 132,
                    kSeeded = 8;  // bytes that take as long as an element's noise
  const int64_t read = 1 + (a.x0 != nullptr) + (a.noise != nullptr);
  const int64_t element = read * size_of(a.dtype) + (a.seed ? kSeeded : 0);
  const auto share = static_cast<double>(a.channels * a.pixels * element);
  const double all = static_cast<double>(a.images) * share / kCard;
  const double alone = static_cast<double>(ceil_div(a.images, kProcessors)) * share / kAlone;
  return std::max(all, alone) <= all + kLaunch ? 1 : ceil_div(4 * kProcessors, a.images);
}

LossPlan loss_plan(int64_t images, int64_t units, int64_t most, int each) {
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

// Launches the first kernel, for at most `most` pieces of an image, and returns how many there are.
// Where that is 1 the kernel writes the losses, else the sums of the pieces.
template <class T, int W, Noise kNoise, int Form, class Image>
int64_t launch_loss(const DenoisingLossArgs& a, const Image& image, int64_t most, float* loss,
                    float* sums, Stream stream) {
  const LossPlan plan = loss_plan(a.images, image.units, most, Units<T, W, kNoise, Form>::kEach);
  FASTDIFF_LAUNCH(denoising_loss_kernel<T, W, kNoise, Form>, plan.grid, plan.threads, 0, stream, a,
                  image, plan, plan.pieces > 1 ? sums : loss);
  return plan.pieces;
}

template <class T, int W, Noise kNoise, int Form, class Image>
void launch_backward(const DenoisingLossArgs& a, const Image& image, const float* grad,
                     void* dprediction, Stream stream) {
  const FlatPlan plan = flat_plan(image.units, a.images, Units<T, W, kNoise, Form>::kEach);
  FASTDIFF_LAUNCH(denoising_loss_backward_kernel<T, W, kNoise, Form>, plan.grid, plan.threads, 0,
                  stream, a, image, grad, dprediction);
}

constexpr int kCombineThreads = 128;  // one warp per image
constexpr int kEach = 2;  // vectors of each of three tensors per thread, where there are many

__global__ void __launch_bounds__(kCombineThreads)
    combine(DenoisingLossArgs a, const float* sums, int64_t pieces, float* loss) {
  const int64_t n = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
  if (n >= a.images) return;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  float sum = 0;
  for (int64_t i = lane; i < pieces; i += 32) sum += load_one(sums + n * pieces + i);
  sum = warp_sum(sum);
  if (lane != 0) return;
  const int64_t t = load_one(a.t + n);
  const bool known = t >= 0 && t < a.steps;
  const float weight = known ? load_one(a.weight + t) : __int_as_float(0x7fffffff);
  store_one(loss + n, image_loss(weight, sum, a.channels * a.pixels));
}

// Calls f(T{}, width, each, image) for units with given noise. `width` is W and `each` is Each, as
// integral constants.
template <class F>
void for_flat_unit(const DenoisingLossArgs& a, const void* dprediction, int64_t pieces, F f) {
  for_dtype(a.dtype, [&](auto tag) {
    using T = decltype(tag);
    const int64_t size = a.channels * a.pixels;
    const int64_t alignment =
        common_alignment(a.prediction, a.x0, a.noise, dprediction, size * sizeof(T));
    for_width<T>(alignment, [&](auto width) {
      const FlatImage image{size / width};
      if (a.images * image.units >= kManyVectors || image.units >= kEach * kThreads * pieces)
        f(tag, width, std::integral_constant<int, kEach>{}, image);
      else
        f(tag, width, std::integral_constant<int, 1>{}, image);
    });
  });
}

// Calls f(T{}, width, form, image) for units with noise from a seed. `width` is W and `form` is
// Form, as integral constants.
template <class F>
void for_seeded_unit(const DenoisingLossArgs& a, const void* dprediction, F f) {
  for_dtype(a.dtype, [&](auto tag) {
    for_noise_unit<decltype(tag)>(
        a.channels_last, a.channels, a.pixels, common_alignment(a.prediction, a.x0, dprediction),
        [&](auto width, auto form, const NoiseImage& image) { f(tag, width, form, image); });
  });
}

}  // namespace

int64_t denoising_loss_workspace(const DenoisingLossArgs& a) {
  const int64_t pieces = a.images > 0 ? most_pieces(a) : 1;
  return pieces > 1 ? a.images * pieces * static_cast<int64_t>(sizeof(float)) : 0;
}

void denoising_loss_cuda(const DenoisingLossArgs& a, float* loss, void* workspace, Stream stream) {
  if (a.images == 0) return;
  auto* sums = static_cast<float*>(workspace);
  const int64_t most = most_pieces(a);
  int64_t pieces = 1;
  if (a.seed) {
    for_seeded_unit(a, nullptr, [&](auto tag, auto width, auto form, const NoiseImage& image) {
      pieces = launch_loss<decltype(tag), decltype(width)::value, Noise::FromSeed,
                           decltype(form)::value>(a, image, most, loss, sums, stream);
    });
  } else {
    for_flat_unit(a, nullptr, most, [&](auto tag, auto width, auto each, const FlatImage& image) {
      pieces =
          launch_loss<decltype(tag), decltype(width)::value, Noise::Given, decltype(each)::value>(
              a, image, most, loss, sums, stream);
    });
  }
  if (pieces == 1) return;
  const auto blocks = static_cast<unsigned>(ceil_div(a.images * 32, kCombineThreads));
  FASTDIFF_LAUNCH(combine, dim3(blocks), kCombineThreads, 0, stream, a, sums, pieces, loss);
}

void denoising_loss_backward_cuda(const DenoisingLossArgs& a, const float* grad, void* dprediction,
                                  Stream stream) {
  if (a.seed) {
    for_seeded_unit(a, dprediction, [&](auto tag, auto width, auto form, const NoiseImage& image) {
      launch_backward<decltype(tag), decltype(width)::value, Noise::FromSeed,
                      decltype(form)::value>(a, image, grad, dprediction, stream);
    });
  } else {
    for_flat_unit(a, dprediction, 1, [&](auto tag, auto width, auto each, const FlatImage& image) {
      launch_backward<decltype(tag), decltype(width)::value, Noise::Given, decltype(each)::value>(
          a, image, grad, dprediction, stream);
    });
  }
}

}  // namespace fastdiff::cuda
