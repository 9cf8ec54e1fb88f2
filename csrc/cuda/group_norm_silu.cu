// y = silu(GroupNorm(cat(x, skip) + add) (1 + scale) + shift) + residual.
//
// Layout: [N, C, P], or [N, P, C] channels-last. Two ways, chosen by group_norm_plan.cuh:
//
// On the chip, where whole groups fit into the registers of a block: read once, compute the mean
// and then the deviations from it, write. This moves 2 S for an activation of S bytes, 3 S with a
// residual: the ideal. It is one launch. It is also faster where it gives only a few dozen blocks:
// the further launches and second reading of a split take longer than half a device takes for a few
// megabytes.
//
// Split, where groups do not fit: statistics of spans of every channel (S read), their combination
// in a small kernel, and the result (2 S, or 3 S): 3 S, or 4 S with a residual. The second reading
// starts where the first ended, and so finds the last part in the second-level cache. If statistics
// are given the first kernel is omitted: 2 S, or 3 S.
//
// Sums are float32, over a thread's few elements and then in trees; spans are combined in float64.
// An approximate mean is corrected by the mean deviation from it, so that the digits of a deviation
// of 0.1 are kept with a mean of 10,000.
#include "cuda/channel_statistics.cuh"
#include "cuda/group_norm_plan.cuh"
#include "cuda/group_norm_silu.h"
#include "cuda/group_norm_tile.cuh"

namespace fastdiff::cuda {
namespace {

using Args = GroupNormSiluArgs;

// Sums v[run] over all threads, for each group of the tile that starts at channel `first`, and
// calls f(group, sums) in one thread per group. All threads see what f wrote.
template <int kValues, class Tile, class F>
__device__ __forceinline__ void sum_groups(const Tile& tile, const Tiling& t, int first,
                                           const float (&v)[Tile::kRuns][kValues], float* shared,
                                           F&& f) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int warps = static_cast<int>(blockDim.x) / 32;
  float sums[kValues] = {};
  if constexpr (Tile::kLast) {
    const int column = t.rows | 1, plane = column * t.groups * t.per_group;
    if (tile.row >= 0)
      for (int run = 0; run < Tile::kRuns; ++run)
        for (int k = 0; k < kValues; ++k)
          shared[k * plane + (tile.channel(run) - first) * column + tile.row] = v[run][k];
    __syncthreads();
    for (int g = warp; g < t.groups; g += warps) {
      for (int k = 0; k < kValues; ++k) {
        const float* group = shared + k * plane + g * t.per_group * column;
        sums[k] = 0;
        for (int c = 0; c < t.per_group; ++c)
          for (int r = lane; r < t.rows; r += 32) sums[k] += group[c * column + r];
        sums[k] = warp_sum(sums[k]);
      }
      if (lane == 0) f(g, sums);
    }
  } else {
    for (int run = 0; run < Tile::kRuns; ++run)
      for (int k = 0; k < kValues; ++k) sums[k] += v[run][k];
    for (int k = 0; k < kValues; ++k) {
      sums[k] = warp_sum(sums[k]);
      if (lane == 0) shared[k * warps + warp] = sums[k];
    }
    __syncthreads();
    if (warp == 0) {
      for (int k = 0; k < kValues; ++k)
        sums[k] = warp_sum(lane < warps ? shared[k * warps + lane] : 0.0f);
      if (lane == 0) f(0, sums);
    }
  }
  __syncthreads();
}

// Writes the tile's result. The three planes hold the coefficients of the channels from `first` on.
template <class T, int W, class Tile, int kPieces, int kSlots>
__device__ __forceinline__ void write(const Args& a, const Tiling& t, const Tile& tile,
                                      int64_t image, const Pack<T, W> (&x)[kPieces][kSlots],
                                      const float* center, const float* gain, const float* offset,
                                      int first) {
  // Residuals that are loaded ahead.
  constexpr int kBatch = kSlots * kPieces > 8 ? 1 : kSlots < 4 ? kSlots : 4;
  constexpr int kCount = Tile::kCoefficients;
#pragma unroll
  for (int i = 0; i < kPieces; ++i) {
    const Piece& piece = tile.pieces[i];
    if (piece.count == 0) continue;
    float m[kCount], g[kCount], o[kCount];
    read_floats(center + (piece.channel - first), m);
    read_floats(gain + (piece.channel - first), g);
    read_floats(offset + (piece.channel - first), o);
    const auto to = piece.in<Tile::kLast>(static_cast<T*>(a.y), image, t);
    const auto from = piece.in<Tile::kLast>(static_cast<const T*>(a.residual), image, t);
#pragma unroll
    for (int batch = 0; batch < kSlots; batch += kBatch) {
      Pack<T, W> r[kBatch] = {};
      if (a.residual)
#pragma unroll
        for (int k = 0; k < kBatch; ++k)
          if (batch + k < piece.count) r[k] = load<W>(from.base + (batch + k) * from.step);
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        const int j = batch + k;
        if (j >= piece.count) continue;
        float v[W];
#pragma unroll
        for (int e = 0; e < W; ++e) {
          const int c = Tile::kLast ? e : 0;
          v[e] = (to_float(x[i][j].value[e]) - m[c]) * g[c] + o[c];
        }
        if (a.silu)
#pragma unroll
          for (int e = 0; e < W; ++e) v[e] *= sigmoid(v[e]);
        if (a.residual)
#pragma unroll
          for (int e = 0; e < W; ++e) v[e] += to_float(r[k].value[e]);
        Pack<T, W> out;
#pragma unroll
        for (int e = 0; e < W; ++e) out.value[e] = from_float<T>(v[e]);
        store(to.base + j * to.step, out);
      }
    }
  }
}

// A group's statistics from the sums of deviations from `pivot` and of their squares.
struct GroupMoments {
  double mean, rstd;

  __device__ __forceinline__ GroupMoments(double pivot, double deviations, double squares,
                                          double count, double eps) {
    const double rest = deviations / count, variance = squares / count - rest * rest;
    mean = pivot + rest;
    rstd = 1 / sqrt((variance < 0 ? 0 : variance) + eps);
  }
};

// Shared memory: the groups' mean and rstd, three planes of coefficients, room for sum_groups.
template <class Tile>
size_t shared_on_chip(const Tiling& t) {
  const int channels = t.groups * t.per_group;
  const int sums = 2 * (Tile::kLast ? channels * (t.rows | 1) : kTileThreads / 32);
  return 2 * t.groups * sizeof(double) + (3 * channels + sums + t.groups) * sizeof(float);
}

template <class T, int W, int kPieces, int kSlots, bool kLast>
__global__ void __launch_bounds__(kTileThreads, blocks_at_once<T, kLast, kPieces * kSlots>())
    on_chip(Args a, Tiling t) {
  using Tile = Tile<T, W, kPieces, kSlots, kLast>;
  const int image = static_cast<int>(blockIdx.x) / t.tiles;
  const int index = static_cast<int>(blockIdx.x) % t.tiles;
  const int channels = t.groups * t.per_group, first = index * channels;
  const Tile tile(t, first, channels, 0, 0);
  typename Tile::Packs x;
  tile.read(inputs<T>(a), image, t, x);

  double* mean = dynamic_shared<double>();
  double* rstd = mean + t.groups;
  float* center = reinterpret_cast<float*>(rstd + t.groups);  // first holds `add`
  float* gain = center + channels;
  float* offset = gain + channels;
  float* pivot = offset + channels;
  float* room = pivot + t.groups;
#pragma unroll 1
  for (int c = static_cast<int>(threadIdx.x); c < channels; c += static_cast<int>(blockDim.x)) {
    const Affine f = Affine::of(a, t, image, first + c, static_cast<const T*>(nullptr));
    center[c] = f.add, gain[c] = f.gain, offset[c] = f.offset;
  }
  __syncthreads();

  float sums[Tile::kRuns][1], moments[Tile::kRuns][2];
  const float count = static_cast<float>(t.per_group) * static_cast<float>(t.pixels);
#pragma unroll
  for (int run = 0; run < Tile::kRuns; ++run) {
    float sum = 0;
    tile.each(run, [&](int i, int j, int e) { sum += to_float(x[i][j].value[e]); });
    sums[run][0] = sum + tile.elements(run) * center[tile.channel(run) - first];
  }
  sum_groups(tile, t, first, sums, room,
             [&](int g, const float (&sum)[1]) { pivot[g] = sum[0] / count; });
#pragma unroll
  for (int run = 0; run < Tile::kRuns; ++run) {
    const int c = tile.channel(run) - first;
    const float add = center[c], middle = pivot[c / t.per_group], from = middle - add;
    const float lost = (middle - (from + (middle - from))) - (add - (middle - from));
    float sum = 0, squares = 0;
    tile.each(run, [&](int i, int j, int e) {
      const float deviation = to_float(x[i][j].value[e]) - from;
      sum += deviation;
      squares += deviation * deviation;
    });
    // x + add - middle is x - from, less the rounding error of `from` (Knuth's two-sum).
    const float shift = tile.elements(run) * lost;
    moments[run][0] = sum - shift;
    moments[run][1] = squares - lost * (2 * sum - shift);
  }
  sum_groups(tile, t, first, moments, room, [&](int g, const float (&sum)[2]) {
    const GroupMoments m(pivot[g], sum[0], sum[1], count, a.eps);
    const int64_t group = image * a.groups + index * t.groups + g;
    mean[g] = m.mean, rstd[g] = m.rstd;
    store_one(a.mean + group, m.mean);
    store_one(a.rstd + group, m.rstd);
  });
#pragma unroll 1
  for (int c = static_cast<int>(threadIdx.x); c < channels; c += static_cast<int>(blockDim.x)) {
    const int g = c / t.per_group;
    const Coefficients f(center[c], gain[c], offset[c], mean[g], rstd[g]);
    center[c] = f.center, gain[c] = f.gain, offset[c] = f.offset;
  }
  __syncthreads();
  unpack_anew(x);
  write(a, t, Tile(t, first, channels, 0, 0), image, x, center, gain, offset, first);
}

// The first split kernel: statistics [N, S, 4, C] of x and skip.
template <class T, int W, int kSlots, bool kLast>
__global__ void __launch_bounds__(kSplitThreads, 2)
    take_statistics(Args a, Tiling t, float* statistics) {
  using Tile = Tile<T, W, 1, kSlots, kLast>;
  const Part part(t, kLast, W, blockIdx.x);
  const Tile tile(t, part.first, part.channels, part.piece, part.begin);
  typename Tile::Packs x;
  tile.read(inputs<T>(a), part.image, t, x);
  const auto span_of = [&](int span) {
    return statistics + (part.image * t.spans + span) * 4 * t.channels;
  };
  const Piece& piece = tile.pieces[0];
  if constexpr (kLast) {
    const RowMoments rows{dynamic_shared<float>(), t.rows, t.lanes * W};
    if (tile.row >= 0)
#pragma unroll
      for (int e = 0; e < W; ++e)
        rows.put(tile.row, piece.channel - part.first + e,
                 moments_of<kSlots, 1>(piece.count,
                                       [&](int j, int) { return to_float(x[0][j].value[e]); }));
    __syncthreads();
    for (int c = static_cast<int>(threadIdx.x); c < part.channels;
         c += static_cast<int>(blockDim.x))
      store_moments(span_of(part.span), t.channels, part.first + c, rows.merge(c));
  } else {
    Moments m = moments_of<kSlots, W>(piece.count,
                                      [&](int j, int e) { return to_float(x[0][j].value[e]); });
    m = merge_lanes(m, t.lanes);
    if (static_cast<int>(threadIdx.x) % t.lanes == 0 && piece.count > 0)
      store_moments(span_of(piece.part), t.channels, piece.channel, m);
  }
}

// The second split kernel: mean and rstd of a group, in float64 and two passes over its channels'
// statistics, and its channels' coefficients [N, 3, C].
template <class T>
__global__ void __launch_bounds__(kSplitThreads)
    combine(Args a, Tiling t, const float* statistics, int spans, float* coefficients) {
  const int64_t image = blockIdx.x / a.groups, channels = t.channels;
  const int64_t first = blockIdx.x % a.groups * t.per_group;
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const T* add = static_cast<const T*>(a.add);
  statistics += image * spans * 4 * channels + first;
  // The threads are rows of neighbours along the channels; the rows share the spans.
  const int side = min(t.per_group, threads), rows = threads / side;
  const int column = thread % side, row = thread / side;
  const auto each = [&](auto&& f) {  // f(count, mean, m2)
    for (int c = column; c < t.per_group && row < rows; c += side) {
      const double added = add ? to_float(load_one(add + image * channels + first + c)) : 0.0f;
      for (int s = row; s < spans; s += rows) {
        const float* at = statistics + s * 4 * channels + c;
        const double n = load_one(at);
        const double mean =
            load_one(at + channels) + static_cast<double>(load_one(at + 2 * channels)) + added;
        f(n, mean, static_cast<double>(load_one(at + 3 * channels)));
      }
    }
  };
  double count = 0, sum = 0, squares = 0, deviations = 0;
  each([&](double n, double mean, double) { count += n, sum += n * mean; });
  count = block_sum(count);
  const double pivot = block_sum(sum) / count;
  each([&](double n, double mean, double m2) {
    const double deviation = mean - pivot;
    deviations += n * deviation;
    squares += m2 + n * deviation * deviation;
  });
  deviations = block_sum(deviations);
  const GroupMoments m(pivot, deviations, block_sum(squares), count, a.eps);
  if (thread == 0) {
    store_one(a.mean + blockIdx.x, m.mean);
    store_one(a.rstd + blockIdx.x, m.rstd);
  }
  coefficients += image * 3 * channels + first;
  for (int c = thread; c < t.per_group; c += threads) {
    const Affine affine = Affine::of(a, t, image, first + c, add);
    const Coefficients f(affine.add, affine.gain, affine.offset, m.mean, m.rstd);
    store_one(coefficients + c, f.center);
    store_one(coefficients + channels + c, f.gain);
    store_one(coefficients + 2 * channels + c, f.offset);
  }
}

// The third split kernel: the result. It begins with the last blocks of the first kernel.
template <class T, int W, int kSlots, bool kLast>
__global__ void __launch_bounds__(kSplitThreads, 2)
    apply(Args a, Tiling t, const float* coefficients) {
  using Tile = Tile<T, W, 1, kSlots, kLast>;
  const Part part(t, kLast, W, gridDim.x - 1 - blockIdx.x);
  const Tile tile(t, part.first, part.channels, part.piece, part.begin);
  typename Tile::Packs x;
  tile.read(inputs<T>(a), part.image, t, x);
  const SplitCoefficients shared(tile, t, part);
  coefficients += part.image * 3 * t.channels;
  shared.fill(tile, t, part, [&](int channel, float* at) {
    for (int k = 0; k < 3; ++k)
      at[k * shared.stride] = load_one(coefficients + k * int64_t{t.channels} + channel);
  });
  write(a, t, tile, part.image, x, shared.planes, shared.planes + shared.stride,
        shared.planes + 2 * shared.stride, shared.first);
}

constexpr int kStatisticsSlots = 8, kApplySlots = 4;

Plan plan_of(const Args& a, int width) {
  const Tiling image = whole_image(a);
  Plan plan{};
  if (a.statistics) return plan;
  if (width == 1) {
    a.channels_last ? hold_groups(image, a.images, a.groups, 1, size_of(a.dtype), {{1, 12}}, plan)
                    : hold_group(image, a.groups, 1, {{5, 4}}, plan);
  } else {
    a.channels_last ? hold_groups(image, a.images, a.groups, width, size_of(a.dtype),
                                  {{1, 2}, {1, 4}, {1, 8}, {1, 12}}, plan)
                    : hold_group(image, a.groups, width, {{1, 2}, {1, 4}, {5, 2}, {5, 4}}, plan);
  }
  return plan;
}

int width_of(const Args& a) { return access_width(a, {a.x, a.skip, a.residual, a.y}); }

template <class T, int W, int kPieces, int kSlots, bool kLast>
void launch_on_chip(const Args& a, const Plan& plan, Stream stream) {
  const size_t shared = shared_on_chip<Tile<T, W, kPieces, kSlots, kLast>>(plan.tiling);
  FASTDIFF_LAUNCH(on_chip<T, W, kPieces, kSlots, kLast>, grid_of(a.images * plan.tiling.tiles),
                  dim3(plan.threads), shared, stream, a, plan.tiling);
}

template <class T, int W, bool kLast>
void launch_split(const Args& a, Stream stream) {
  const Tiling image = whole_image(a);
  const int64_t channels = image.channels;
  float* coefficients = static_cast<float*>(a.workspace);  // [N, 3, C]
  const float* statistics = a.statistics;
  int64_t spans = a.spans;
  if (!statistics) {
    const Tiling t = split(image, kLast, W, kStatisticsSlots);
    float* taken = coefficients + a.images * 3 * channels;
    const size_t shared = kLast ? RowMoments::size(t.rows, t.lanes * W) * sizeof(float) : 0;
    FASTDIFF_LAUNCH(take_statistics<T, W, kStatisticsSlots, kLast>,
                    grid_of(split_blocks(t, kLast, a.images)), dim3(kSplitThreads), shared, stream,
                    a, t, taken);
    statistics = taken;
    spans = t.spans;
  }
  FASTDIFF_LAUNCH(combine<T>, grid_of(a.images * a.groups), dim3(kSplitThreads), 0, stream, a,
                  image, statistics, static_cast<int>(spans), coefficients);
  const Tiling t = split(image, kLast, W, kApplySlots);
  FASTDIFF_LAUNCH(apply<T, W, kApplySlots, kLast>, grid_of(split_blocks(t, kLast, a.images)),
                  dim3(kSplitThreads), SplitCoefficients::bytes(t, kLast, W, 3), stream, a, t,
                  coefficients);
}

// Runs the instance for what a thread holds. The cases are the holdings that plan_of chooses from.
template <class T, int W, bool kLast>
void launch(const Args& a, const Plan& plan, Stream stream) {
  if (!plan.on_chip) return launch_split<T, W, kLast>(a, stream);
  const auto [pieces, slots] = plan.holding;
  if constexpr (W == 1 && kLast) {
    launch_on_chip<T, 1, 1, 12, true>(a, plan, stream);
  } else if constexpr (W == 1) {
    launch_on_chip<T, 1, 5, 4, false>(a, plan, stream);
  } else if (pieces == 1 && slots == 2) {
    launch_on_chip<T, W, 1, 2, kLast>(a, plan, stream);
  } else if (pieces == 1 && slots == 4) {
    launch_on_chip<T, W, 1, 4, kLast>(a, plan, stream);
  } else if constexpr (kLast) {
    slots == 8 ? launch_on_chip<T, W, 1, 8, true>(a, plan, stream)
               : launch_on_chip<T, W, 1, 12, true>(a, plan, stream);
  } else {
    slots == 2 ? launch_on_chip<T, W, 5, 2, false>(a, plan, stream)
               : launch_on_chip<T, W, 5, 4, false>(a, plan, stream);
  }
}

}  // namespace

int64_t group_norm_silu_workspace(const Args& a) {
  if (!has_elements(a)) return 0;
  const int width = width_of(a);
  if (plan_of(a, width).on_chip) return 0;
  const Tiling image = whole_image(a);
  int64_t planes = 3;
  if (!a.statistics)
    planes += 4 * int64_t{split(image, a.channels_last, width, kStatisticsSlots).spans};
  return planes * a.images * image.channels * static_cast<int64_t>(sizeof(float));
}

void group_norm_silu_cuda(const Args& a, Stream stream) {
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
  });
}

}  // namespace fastdiff::cuda
