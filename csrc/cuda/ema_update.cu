// average = lerp(average, parameter, weight) for a whole list of pairs, in one launch.
//
// In float32: average + weight (parameter - average) where |weight| < 1/2, else
// parameter - (parameter - average) (1 - weight), as torch.lerp does, so that a weight of 0 leaves
// the average and a weight of 1 gives the parameter.
// Reads 2 S and writes 1 S for averages and parameters of S bytes each, the minimum, and 24 bytes
// of the table for each 4096 elements. A row of the table tells a block its chunk: there is no
// search, and thousands of small tensors cost only their bytes. A chunk whose two addresses are
// aligned is moved 16 bytes at a time, except the last elements of a tensor. Each row is checked by
// itself, so that one misaligned tensor does not slow the others.
#include "cuda/access.cuh"
#include "cuda/ema_update.h"

namespace fastdiff::cuda {
namespace {

__device__ __forceinline__ float lerp(float average, float parameter, float weight) {
  const float difference = parameter - average;
  return weight < 0.5f && weight > -0.5f ? average + weight * difference
                                         : parameter - difference * (1 - weight);
}

// V elements as floats, by as many accesses of 16 bytes as they need.
template <int V, class T>
__device__ __forceinline__ void load_floats(const T* at, float (&v)[V]) {
  constexpr int W = kWidth<T> < V ? kWidth<T> : V;
#pragma unroll
  for (int i = 0; i < V; i += W) {
    const Pack<T, W> pack = load<W>(at + i);
#pragma unroll
    for (int j = 0; j < W; ++j) v[i + j] = to_float(pack.value[j]);
  }
}

template <int V, class T>
__device__ __forceinline__ void store_floats(T* at, const float (&v)[V]) {
  constexpr int W = kWidth<T> < V ? kWidth<T> : V;
#pragma unroll
  for (int i = 0; i < V; i += W) {
    Pack<T, W> pack;
#pragma unroll
    for (int j = 0; j < W; ++j) pack.value[j] = from_float<T>(v[i + j]);
    store(at + i, pack);
  }
}

template <class A, class P>
__global__ void __launch_bounds__(kThreads) ema_update_kernel(EmaUpdateArgs args) {
  constexpr int V = kWidth<A> > kWidth<P> ? kWidth<A> : kWidth<P>;
  constexpr int kSteps = kEmaChunk / (V * kThreads);
  static_assert(kEmaChunk % (V * kThreads) == 0);
  const int64_t* row = args.table + 3 * static_cast<int64_t>(blockIdx.x);
  A* average = reinterpret_cast<A*>(load_one(row));
  const P* parameter = reinterpret_cast<const P*>(load_one(row + 1));
  const auto count = static_cast<int>(load_one(row + 2));
  const float weight = load_one(args.weight);
  const auto addresses =
      reinterpret_cast<uintptr_t>(average) | reinterpret_cast<uintptr_t>(parameter);
  const int whole = addresses % 16 == 0 ? count / V * V : 0;

  float a[kSteps][V], p[kSteps][V];
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const int i = (step * kThreads + static_cast<int>(threadIdx.x)) * V;
    if (i < whole) {
      load_floats<V>(average + i, a[step]);
      load_floats<V>(parameter + i, p[step]);
    }
  }
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const int i = (step * kThreads + static_cast<int>(threadIdx.x)) * V;
    if (i < whole) {
#pragma unroll
      for (int j = 0; j < V; ++j) a[step][j] = lerp(a[step][j], p[step][j], weight);
      store_floats<V>(average + i, a[step]);
    }
  }
#pragma unroll 4
  for (int i = whole + static_cast<int>(threadIdx.x); i < count; i += kThreads) {
    const float value =
        lerp(to_float(load_one(average + i)), to_float(load_one(parameter + i)), weight);
    store_one(average + i, from_float<A>(value));
  }
}

}  // namespace

std::vector<int64_t> ema_update_table(const std::vector<EmaPair>& pairs, Dtype average,
                                      Dtype parameter) {
  std::vector<int64_t> table;
  for (const EmaPair& pair : pairs) {
    const auto a = reinterpret_cast<int64_t>(pair.average);
    const auto p = reinterpret_cast<int64_t>(pair.parameter);
    for (int64_t i = 0; i < pair.count; i += kEmaChunk)
      table.insert(table.end(), {a + i * size_of(average), p + i * size_of(parameter),
                                 std::min(kEmaChunk, pair.count - i)});
  }
  return table;
}

void ema_update_cuda(const EmaUpdateArgs& args, Stream stream) {
  for_dtype(args.average, [&](auto average) {
    for_dtype(args.parameter, [&](auto parameter) {
      FASTDIFF_LAUNCH(ema_update_kernel<decltype(average), decltype(parameter)>,
                      dim3(static_cast<unsigned>(args.chunks)), kThreads, 0, stream, args);
    });
  });
}

}  // namespace fastdiff::cuda
