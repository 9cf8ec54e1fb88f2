// Gradients of group_norm_silu.
//
// With h = (x + add - mean) rstd the normalised value, G = weight (1 + scale), z = h G + offset the
// value before SiLU s, and dz = grad s'(z), over a group of K elements of which a channel has P:
//
//   dx = rstd (G dz - db - h ds),   db = sum(G dz) / K,   ds = sum(G dz h) / K
//
// and all gradients per channel follow from its sums A = sum dz, B = sum dz h, X = sum h:
//
//   dshift = A   dscale = weight B + bias A   dadd = rstd (G A - P db - X ds)
//   dweight = sum over images of (1 + scale) B   dbias = sum over images of (1 + scale) A
//
// The sums are computed with x - center instead of h, where center is mean - add rounded, and are
// corrected in float64. That keeps the digits of a small deviation from a large mean.
//
// Layout: [N, C, P], or [N, P, C] channels-last. Two ways, chosen by group_norm_plan.cuh:
//
// On the chip, where x and grad of whole groups fit into the registers of a block: read once, sum,
// write. This moves 3 S for an activation of S bytes, the ideal. dz is computed twice, not kept:
// an exponential is cheaper than the registers of another activation.
//
// Split, where groups do not fit: sums of spans of every channel (2 S read), their combination in a
// small kernel, and dx (2 S read, S written): 5 S. The second reading starts where the first ended,
// and so finds the last part in the second-level cache.
//
// In both cases a last small kernel sums the parameters' gradients over the images, always in the
// same order; no sum is atomic.
#include "cuda/group_norm_plan.cuh"
#include "cuda/group_norm_silu_backward.h"
#include "cuda/group_norm_tile.cuh"

namespace fastdiff::cuda {
namespace {

using Args = GroupNormSiluBackwardArgs;

constexpr int kSums = 3;    // of a channel: dz, dz (x - center), x - center
constexpr int kPlanes = 5;  // of coefficients: center, gain, offset, curve, base

// grad s'(z), with s'(z) = s + z s (1 - s) for the sigmoid s.
__device__ __forceinline__ float before_silu(float grad, float z, bool silu) {
  if (!silu) return grad;
  const float s = sigmoid(z);
  return grad * (s + z * s * (1 - s));
}

// A group's mean and rstd.
struct Group {
  double mean, rstd;

  __device__ __forceinline__ Group(const Args& a, const Tiling& t, int64_t image, int channel) {
    const int64_t group = image * a.groups + channel / t.per_group;
    mean = load_one(a.mean + group);
    rstd = load_one(a.rstd + group);
  }
};

template <class T>
__device__ __forceinline__ Coefficients coefficients_of(const Args& a, const Tiling& t,
                                                        int64_t image, int channel) {
  const Affine f = Affine::of(a, t, image, channel, static_cast<const T*>(nullptr));
  const Group group(a, t, image, channel);
  return Coefficients(f.add, f.gain, f.offset, group.mean, group.rstd);
}

// The three sums over a run of a thread's elements.
template <class T, int W, class Tile, int kPieces, int kSlots>
__device__ __forceinline__ void sum_run(const Tile& tile, int run, bool silu, float center,
                                        float gain, float offset,
                                        const Pack<T, W> (&x)[kPieces][kSlots],
                                        const Pack<T, W> (&grad)[kPieces][kSlots],
                                        float (&sums)[kSums]) {
  sums[0] = sums[1] = sums[2] = 0;
  tile.each(run, [&](int i, int j, int e) {
    const float centred = to_float(x[i][j].value[e]) - center;
    const float dz = before_silu(to_float(grad[i][j].value[e]), centred * gain + offset, silu);
    sums[0] += dz;
    sums[1] += dz * centred;
    sums[2] += centred;
  });
}

// Sums `columns` columns of `rows` contiguous values each in shared memory, and calls f(column,
// sum) in one thread per column. All threads see what f wrote.
template <class F>
__device__ __forceinline__ void sum_columns(const float* shared, int columns, int rows, F&& f) {
  const int lanes = lanes_for(columns), team = static_cast<int>(threadIdx.x) / lanes;
  const int teams = static_cast<int>(blockDim.x) / lanes;
  const int lane = static_cast<int>(threadIdx.x) % lanes;
  for (int base = 0; base < columns; base += teams) {
    const int column = base + team;
    float sum = 0;
    if (column < columns)
      for (int r = lane; r < rows; r += lanes) sum += shared[column * (rows | 1) + r];
    sum = lanes_sum(sum, lanes);
    if (lane == 0 && column < columns) f(column, sum);
  }
  __syncthreads();
}

// The values of a channel from which a group's db, ds and dadd follow: G A, G B and X above.
struct ChannelSums {
  float dz, dz_h, h;
};

// Writes dshift and dscale from the sums of a channel, and for the parameters' gradients its values
// (1 + scale) B and (1 + scale) A in the two planes of [N, 2, C].
template <class T>
__device__ __forceinline__ ChannelSums take_channel(const Args& a, const Tiling& t, int64_t image,
                                                    int channel, const Affine& f, double rstd,
                                                    double rest, const float (&sums)[kSums],
                                                    float* parameters, const T*) {
  const double dz = sums[0], dz_h = sums[1] * rstd + dz * rest;
  const int64_t index = image * t.channels + channel;
  store_one(static_cast<T*>(a.dshift) + index, from_float<T>(sums[0]));
  store_one(static_cast<T*>(a.dscale) + index,
            from_float<T>(static_cast<float>(f.weight * dz_h + f.bias * dz)));
  parameters += image * 2 * t.channels + channel;
  store_one(parameters, static_cast<float>(f.grow * dz_h));
  store_one(parameters + t.channels, static_cast<float>(f.grow * dz));
  return {static_cast<float>(f.gain * dz), static_cast<float>(f.gain * dz_h),
          static_cast<float>(sums[2] * rstd + t.pixels * rest)};
}

// The coefficients of dx = dz gain + (x - center) curve + base of a channel, from its group's db
// and ds. Writes dadd.
struct Slope {
  float curve, base;

  template <class T>
  __device__ __forceinline__ Slope(const Args& a, const Tiling& t, int64_t image, int channel,
                                   const ChannelSums& s, double rstd, double rest, double db,
                                   double ds, const T*) {
    curve = static_cast<float>(-rstd * rstd * ds);
    base = static_cast<float>(-rstd * (db + rest * ds));
    store_one(static_cast<T*>(a.dadd) + image * t.channels + channel,
              from_float<T>(static_cast<float>(rstd * (s.dz - t.pixels * db - s.h * ds))));
  }
};

// Writes the tile's dx. The planes hold the coefficients of the channels from `first` on.
template <class T, int W, class Tile, int kPieces, int kSlots>
__device__ __forceinline__ void write(const Args& a, const Tiling& t, const Tile& tile,
                                      int64_t image, const Pack<T, W> (&x)[kPieces][kSlots],
                                      const Pack<T, W> (&grad)[kPieces][kSlots],
                                      const float* planes, int plane, int first) {
  constexpr int kCount = Tile::kCoefficients;
  const Joined<T> dx{static_cast<T*>(a.dx), static_cast<T*>(a.dskip), a.channels, a.skip_channels};
#pragma unroll
  for (int i = 0; i < kPieces; ++i) {
    const Piece& piece = tile.pieces[i];
    if (piece.count == 0) continue;
    float f[kPlanes][kCount];
#pragma unroll
    for (int k = 0; k < kPlanes; ++k)
      read_floats(planes + k * plane + (piece.channel - first), f[k]);
    const auto to = piece.in<Tile::kLast>(dx, image, t);
#pragma unroll
    for (int j = 0; j < kSlots; ++j) {
      if (j >= piece.count) continue;
      Pack<T, W> out;
#pragma unroll
      for (int e = 0; e < W; ++e) {
        const int c = Tile::kLast ? e : 0;
        const float centred = to_float(x[i][j].value[e]) - f[0][c];
        const float dz =
            before_silu(to_float(grad[i][j].value[e]), centred * f[1][c] + f[2][c], a.silu);
        out.value[e] = from_float<T>(dz * f[1][c] + (centred * f[3][c] + f[4][c]));
      }
      store(to.base + j * to.step, out);
    }
  }
}

// Shared memory: planes of coefficients, planes of the channels' sums, and room for sum_columns.
size_t shared_on_chip(const Tiling& t) {
  const int channels = t.groups * t.per_group;
  return channels * (kPlanes + kSums + kSums * (t.rows | 1)) * sizeof(float);
}

template <class T, int W, int kPieces, int kSlots, bool kLast>
__global__ void __launch_bounds__(kTileThreads, blocks_at_once<T, kLast, 2 * kPieces * kSlots>())
    on_chip(Args a, Tiling t, float* parameters) {
  using Tile = Tile<T, W, kPieces, kSlots, kLast>;
  const int image = static_cast<int>(blockIdx.x) / t.tiles;
  const int channels = t.groups * t.per_group;
  const int first = static_cast<int>(blockIdx.x) % t.tiles * channels;
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const Tile tile(t, first, channels, 0, 0);
  typename Tile::Packs x, grad;
  tile.read(inputs<T>(a), image, t, x);
  tile.read(static_cast<const T*>(a.grad), image, t, grad);

  float* planes = dynamic_shared<float>();
  float* sums = planes + kPlanes * channels;
  float* room = sums + kSums * channels;
#pragma unroll 1
  for (int c = thread; c < channels; c += threads) {
    const Coefficients f = coefficients_of<T>(a, t, image, first + c);
    planes[c] = f.center, planes[channels + c] = f.gain, planes[2 * channels + c] = f.offset;
  }
  __syncthreads();

#pragma unroll
  for (int run = 0; run < Tile::kRuns; ++run) {
    const int c = tile.channel(run) - first;
    float sum[kSums];
    sum_run(tile, run, a.silu, planes[c], planes[channels + c], planes[2 * channels + c], x, grad,
            sum);
    bool holds = tile.row >= 0;
    int row = tile.row;
    if constexpr (!kLast) {
      for (float& value : sum) value = lanes_sum(value, t.lanes);
      holds = thread % t.lanes == 0 && tile.piece(run).count > 0;
      row = tile.piece(run).part;
    }
    if (holds)
      for (int k = 0; k < kSums; ++k) room[(k * channels + c) * (t.rows | 1) + row] = sum[k];
  }
  __syncthreads();
  sum_columns(room, kSums * channels, t.rows, [&](int column, float sum) { sums[column] = sum; });
  const T* tag = nullptr;
#pragma unroll 1
  for (int c = thread; c < channels; c += threads) {
    const Affine affine = Affine::of(a, t, image, first + c, tag);
    const Group group(a, t, image, first + c);
    const Coefficients f(affine.add, affine.gain, affine.offset, group.mean, group.rstd);
    const ChannelSums s =
        take_channel(a, t, image, first + c, affine, group.rstd, f.rest,
                     {sums[c], sums[channels + c], sums[2 * channels + c]}, parameters, tag);
    sums[c] = s.dz, sums[channels + c] = s.dz_h, sums[2 * channels + c] = s.h;
    planes[3 * channels + c] = f.rest;
  }
  __syncthreads();
  for (int g = thread / 32; g < t.groups; g += threads / 32) {
    const int begin = g * t.per_group, end = begin + t.per_group;
    const double size = static_cast<double>(t.per_group) * t.pixels;
    double db = 0, ds = 0;
    for (int c = begin + thread % 32; c < end; c += 32) db += sums[c], ds += sums[channels + c];
    db = warp_sum(db) / size;
    ds = warp_sum(ds) / size;
    const double rstd = Group(a, t, image, first + begin).rstd;
#pragma unroll 1
    for (int c = begin + thread % 32; c < end; c += 32) {
      const ChannelSums s{sums[c], sums[channels + c], sums[2 * channels + c]};
      const Slope slope(a, t, image, first + c, s, rstd, planes[3 * channels + c], db, ds, tag);
      planes[3 * channels + c] = slope.curve;
      planes[4 * channels + c] = slope.base;
    }
  }
  __syncthreads();
  unpack_anew(x);
  unpack_anew(grad);
  write(a, t, Tile(t, first, channels, 0, 0), image, x, grad, planes, channels, first);
}

// The first split kernel: sums [N, S, 3, C].
template <class T, int W, int kSlots, bool kLast>
__global__ void __launch_bounds__(kSplitThreads, 2) take_sums(Args a, Tiling t, float* sums) {
  using Tile = Tile<T, W, 1, kSlots, kLast>;
  const Part part(t, kLast, W, blockIdx.x);
  const Tile tile(t, part.first, part.channels, part.piece, part.begin);
  typename Tile::Packs x, grad;
  tile.read(inputs<T>(a), part.image, t, x);
  tile.read(static_cast<const T*>(a.grad), part.image, t, grad);
  const SplitCoefficients shared(tile, t, part);
  shared.fill(tile, t, part, [&](int channel, float* at) {
    const Coefficients f = coefficients_of<T>(a, t, part.image, channel);
    at[0] = f.center, at[shared.stride] = f.gain, at[2 * shared.stride] = f.offset;
  });
  sums += part.image * t.spans * kSums * t.channels;
  const auto sum_of = [&](int run, float (&sum)[kSums]) {
    const float* f = shared.planes + (tile.channel(run) - shared.first);
    sum_run(tile, run, a.silu, f[0], f[shared.stride], f[2 * shared.stride], x, grad, sum);
  };
  if constexpr (kLast) {
    const int channels = t.lanes * W;  // the last tile may have fewer
    float* room = shared.planes + 3 * channels;
    if (tile.row >= 0)
#pragma unroll
      for (int run = 0; run < W; ++run) {
        float sum[kSums];
        sum_of(run, sum);
        const int c = tile.channel(run) - part.first;
        for (int k = 0; k < kSums; ++k) room[(k * channels + c) * (t.rows | 1) + tile.row] = sum[k];
      }
    __syncthreads();
    sum_columns(room, kSums * channels, t.rows, [&](int column, float sum) {
      const int k = column / channels, c = column - k * channels;
      if (c < part.channels)
        store_one(sums + (int64_t{part.span} * kSums + k) * t.channels + part.first + c, sum);
    });
  } else {
    const Piece& piece = tile.pieces[0];
    float sum[kSums];
    sum_of(0, sum);
    for (float& value : sum) value = lanes_sum(value, t.lanes);
    if (static_cast<int>(threadIdx.x) % t.lanes == 0 && piece.count > 0)
      for (int k = 0; k < kSums; ++k)
        store_one(sums + (int64_t{piece.part} * kSums + k) * t.channels + piece.channel, sum[k]);
  }
}

// The second split kernel: the channels of a group. `totals` [N, 3, C] gets the sums over all
// spans.
template <class T>
__global__ void __launch_bounds__(kSplitThreads)
    combine(Args a, Tiling t, const float* sums, int spans, float* totals, float* coefficients,
            float* parameters) {
  const int64_t image = blockIdx.x / a.groups, channels = t.channels;
  const int first = static_cast<int>(blockIdx.x % a.groups) * t.per_group;
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  sums += image * spans * kSums * channels + first;
  totals += image * kSums * channels + first;
  coefficients += image * kPlanes * channels + first;
  const int columns = kSums * t.per_group, lanes = lanes_for(columns), teams = threads / lanes;
  for (int base = 0; base < columns; base += teams) {
    const int column = base + thread / lanes;
    const int64_t at = column / t.per_group * channels + column % t.per_group;
    double sum = 0;
    if (column < columns)
      for (int s = thread % lanes; s < spans; s += lanes)
        sum += load_one(sums + s * kSums * channels + at);
    sum = lanes_sum(sum, lanes);
    if (thread % lanes == 0 && column < columns) store_one(totals + at, static_cast<float>(sum));
  }
  __syncthreads();
  const T* tag = nullptr;
  const Group group(a, t, image, first);
  double db = 0, ds = 0;
#pragma unroll 1
  for (int c = thread; c < t.per_group; c += threads) {
    float* of_channel = totals + c;
    const Affine affine = Affine::of(a, t, image, first + c, tag);
    const Coefficients f(affine.add, affine.gain, affine.offset, group.mean, group.rstd);
    const ChannelSums s = take_channel(a, t, image, first + c, affine, group.rstd, f.rest,
                                       {load_one(of_channel), load_one(of_channel + channels),
                                        load_one(of_channel + 2 * channels)},
                                       parameters, tag);
    db += s.dz, ds += s.dz_h;
    store_one(of_channel, s.dz);
    store_one(of_channel + channels, s.h);
    const float values[] = {f.center, f.gain, f.offset, f.rest};
#pragma unroll
    for (int k = 0; k < 4; ++k) store_one(coefficients + k * channels + c, values[k]);
  }
  const double size = static_cast<double>(t.per_group) * t.pixels;
  db = block_sum(db) / size;
  ds = block_sum(ds) / size;
#pragma unroll 1
  for (int c = thread; c < t.per_group; c += threads) {
    const ChannelSums s{load_one(totals + c), 0, load_one(totals + channels + c)};
    float* curve = coefficients + 3 * channels + c;  // where `rest` was stored
    const Slope slope(a, t, image, first + c, s, group.rstd, load_one(curve), db, ds, tag);
    store_one(curve, slope.curve);
    store_one(curve + channels, slope.base);
  }
}

// The third split kernel: dx. It begins with the last blocks of the first kernel.
template <class T, int W, int kSlots, bool kLast>
__global__ void __launch_bounds__(kSplitThreads, 2)
    apply(Args a, Tiling t, const float* coefficients) {
  using Tile = Tile<T, W, 1, kSlots, kLast>;
  const Part part(t, kLast, W, gridDim.x - 1 - blockIdx.x);
  const Tile tile(t, part.first, part.channels, part.piece, part.begin);
  typename Tile::Packs x, grad;
  tile.read(inputs<T>(a), part.image, t, x);
  tile.read(static_cast<const T*>(a.grad), part.image, t, grad);
  const SplitCoefficients shared(tile, t, part);
  coefficients += part.image * kPlanes * t.channels;
  shared.fill(tile, t, part, [&](int channel, float* at) {
    for (int k = 0; k < kPlanes; ++k)
      at[k * shared.stride] = load_one(coefficients + k * int64_t{t.channels} + channel);
  });
  write(a, t, tile, part.image, x, grad, shared.planes, shared.stride, shared.first);
}

// The last kernel: the parameters' gradients, from [N, 2, C]. A block takes 32 channels, and each
// of its warps some images.
template <class T>
__global__ void __launch_bounds__(kSplitThreads) sum_images(Args a, Tiling t, const float* sums) {
  constexpr int kWarps = kSplitThreads / 32;
  __shared__ double partial[kWarps][2][32];
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t channels = t.channels, channel = int64_t{blockIdx.x} * 32 + lane;
  double sum[2] = {0, 0};
  if (channel < channels)
    for (int64_t n = warp; n < a.images; n += kWarps)
      for (int k = 0; k < 2; ++k) sum[k] += load_one(sums + (n * 2 + k) * channels + channel);
  for (int k = 0; k < 2; ++k) partial[warp][k][lane] = sum[k];
  __syncthreads();
  if (warp < 2 && channel < channels) {
    double total = 0;
    for (int w = 0; w < kWarps; ++w) total += partial[w][warp][lane];
    T* to = static_cast<T*>(warp == 0 ? a.dweight : a.dbias);
    store_one(to + channel, from_float<T>(static_cast<float>(total)));
  }
}

constexpr int kSplitSlots = 4;

Plan plan_of(const Args& a, int width) {
  const Tiling image = whole_image(a);
  Plan plan{};
  if (width == 1) {
    a.channels_last ? hold_groups(image, a.images, a.groups, 1, size_of(a.dtype), {{1, 4}}, plan)
                    : hold_group(image, a.groups, 1, {{1, 4}}, plan);
  } else {
    a.channels_last ? hold_groups(image, a.images, a.groups, width, size_of(a.dtype),
                                  {{1, 2}, {1, 4}, {1, 8}}, plan)
                    : hold_group(image, a.groups, width, {{1, 2}, {1, 4}, {5, 2}}, plan);
  }
  return plan;
}

int width_of(const Args& a) { return access_width(a, {a.grad, a.x, a.skip, a.dx, a.dskip}); }

// The workspace, in floats.
struct Workspace {
  int64_t coefficients, sums, totals, parameters;

  Workspace(const Args& a, int width) : coefficients(0), sums(0), totals(0) {
    const int64_t channels = a.images * (a.channels + a.skip_channels);
    parameters = 2 * channels;
    if (plan_of(a, width).on_chip) return;
    coefficients = kPlanes * channels;
    sums = kSums * channels * split(whole_image(a), a.channels_last, width, kSplitSlots).spans;
    totals = kSums * channels;
  }

  int64_t all() const { return coefficients + sums + totals + parameters; }
};

template <class T, int W, int kPieces, int kSlots, bool kLast>
void launch_on_chip(const Args& a, const Plan& plan, Stream stream) {
  FASTDIFF_LAUNCH(on_chip<T, W, kPieces, kSlots, kLast>, grid_of(a.images * plan.tiling.tiles),
                  dim3(plan.threads), shared_on_chip(plan.tiling), stream, a, plan.tiling,
                  static_cast<float*>(a.workspace));
}

template <class T, int W, bool kLast>
void launch_split(const Args& a, Stream stream) {
  const Workspace sizes(a, W);
  float* coefficients = static_cast<float*>(a.workspace);
  float* sums = coefficients + sizes.coefficients;
  float* totals = sums + sizes.sums;
  const dim3 block(kSplitThreads);
  const Tiling t = split(whole_image(a), kLast, W, kSplitSlots);
  const size_t room = kLast ? t.lanes * W * kSums * (t.rows | 1) * sizeof(float) : 0;
  FASTDIFF_LAUNCH(take_sums<T, W, kSplitSlots, kLast>, grid_of(split_blocks(t, kLast, a.images)),
                  block, SplitCoefficients::bytes(t, kLast, W, 3) + room, stream, a, t, sums);
  FASTDIFF_LAUNCH(combine<T>, grid_of(a.images * a.groups), block, 0, stream, a, t, sums, t.spans,
                  totals, coefficients, totals + sizes.totals);
  FASTDIFF_LAUNCH(apply<T, W, kSplitSlots, kLast>, grid_of(split_blocks(t, kLast, a.images)), block,
                  SplitCoefficients::bytes(t, kLast, W, kPlanes), stream, a, t, coefficients);
}

// Runs the instance for what a thread holds. The cases are the holdings that plan_of chooses from.
template <class T, int W, bool kLast>
void launch(const Args& a, const Plan& plan, Stream stream) {
  if (!plan.on_chip) return launch_split<T, W, kLast>(a, stream);
  const auto [pieces, slots] = plan.holding;
  if constexpr (W > 1) {
    if (pieces == 1 && slots == 2) return launch_on_chip<T, W, 1, 2, kLast>(a, plan, stream);
    if constexpr (kLast) {
      if (slots == 8) return launch_on_chip<T, W, 1, 8, true>(a, plan, stream);
    } else {
      if (pieces == 5) return launch_on_chip<T, W, 5, 2, false>(a, plan, stream);
    }
  }
  launch_on_chip<T, W, 1, 4, kLast>(a, plan, stream);
}

}  // namespace

int64_t group_norm_silu_backward_workspace(const Args& a) {
  if (!has_elements(a)) return 0;
  return Workspace(a, width_of(a)).all() * static_cast<int64_t>(sizeof(float));
}

void group_norm_silu_backward_cuda(const Args& a, Stream stream) {
  if (!has_elements(a)) return;
  const int width = width_of(a);
  const Plan plan = plan_of(a, width);
  for_dtype(a.dtype, [&]<class T>(T) {
    if (width == 1) {
      a.channels_last ? launch<T, 1, true>(a, plan, stream) : launch<T, 1, false>(a, plan, stream);
    } else {
      a.channels_last ? launch<T, kWidth<T>, true>(a, plan, stream)
                      : launch<T, kWidth<T>, false>(a, plan, stream);
    }
    const Workspace sizes(a, width);
    FASTDIFF_LAUNCH(sum_images<T>, grid_of(ceil_div(a.channels + a.skip_channels, 32)),
                    dim3(kSplitThreads), 0, stream, a, whole_image(a),
                    static_cast<const float*>(a.workspace) + sizes.all() - sizes.parameters);
  });
}

}  // namespace fastdiff::cuda
