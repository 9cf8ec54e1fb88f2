// The basics of every kernel: packs of elements that one instruction moves, conversions, sums over
// a warp and a block, and the only way to launch.
//
// Compiled with -DFASTDIFF_EMULATE the same sources run on the host, one fiber or thread per CUDA
// thread (tools/emulation): there load and store count bytes and check alignment, which is why
// every access to global memory goes through them.
#pragma once

#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "cuda/launch.h"

#ifdef FASTDIFF_EMULATE
#include "cuda_emulation.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

namespace fastdiff::cuda {

// N neighbouring elements, aligned so that one access moves them: at most 16 bytes, the widest
// access that Ampere, Hopper and Blackwell all have.
template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
  static_assert(sizeof(T) * N <= 16, "no access is wider than 16 bytes");
  T value[N];
};

template <class T>
constexpr int kWidth = 16 / static_cast<int>(sizeof(T));  // elements in the widest access

#ifndef FASTDIFF_EMULATE
// The integer as which a pack is moved. A struct of 16-bit floats would be moved piecewise.
template <int Bytes>
struct WordOf;
template <>
struct WordOf<1> {
  using type = unsigned char;
};
template <>
struct WordOf<2> {
  using type = unsigned short;
};
template <>
struct WordOf<4> {
  using type = unsigned int;
};
template <>
struct WordOf<8> {
  using type = uint2;
};
template <>
struct WordOf<16> {
  using type = uint4;
};
#endif

// Reads N elements at `at`, which must be aligned to all of them together.
template <int N, class T>
__device__ __forceinline__ Pack<T, N> load(const T* at) {
  Pack<T, N> pack;
#ifdef FASTDIFF_EMULATE
  emulation::count_load(at, sizeof(pack));
  std::memcpy(&pack, at, sizeof(pack));
#else
  using Word = typename WordOf<sizeof(pack)>::type;
  const Word word = *reinterpret_cast<const Word*>(at);
  memcpy(&pack, &word, sizeof(pack));
#endif
  return pack;
}

// Writes N elements at `at`, which must be aligned to all of them together.
template <class T, int N>
__device__ __forceinline__ void store(T* at, Pack<T, N> pack) {
#ifdef FASTDIFF_EMULATE
  emulation::count_store(at, sizeof(pack));
  std::memcpy(at, &pack, sizeof(pack));
#else
  using Word = typename WordOf<sizeof(pack)>::type;
  Word word;
  memcpy(&word, &pack, sizeof(pack));
  if constexpr (sizeof(pack) > 4)
    __stwb(reinterpret_cast<Word*>(at), word);
  else
    *reinterpret_cast<Word*>(at) = word;
#endif
}

template <class T>
__device__ __forceinline__ T load_one(const T* at) {
  return load<1>(at).value[0];
}

template <class T>
__device__ __forceinline__ void store_one(T* at, T value) {
  store(at, Pack<T, 1>{{value}});
}

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }

// Converts a float to T, rounded to nearest, ties to even.
template <class T>
__device__ __forceinline__ T from_float(float value) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(value);
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(value);
  } else {
    static_assert(std::is_same_v<T, float>);
    return value;
  }
}

// The dynamic shared memory of the launch, aligned to 16 bytes. A kernel has a single such region.
template <class T>
__device__ __forceinline__ T* dynamic_shared() {
#ifdef FASTDIFF_EMULATE
  return static_cast<T*>(emulation::dynamic_shared());
#else
  extern __shared__ __align__(16) unsigned char fastdiff_dynamic_shared[];
  return reinterpret_cast<T*>(fastdiff_dynamic_shared);
#endif
}

// The sum over a warp, to every lane. All 32 lanes take part.
template <class T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) value += __shfl_xor_sync(0xffffffffu, value, lanes);
  return value;
}

// The sum over a one-dimensional block of whole warps, to every thread, always in the same order.
// It has two barriers; the first allows a second call without a barrier in between.
template <class T>
__device__ __forceinline__ T block_sum(T value) {
  __shared__ T partial[32];
  const int warps = static_cast<int>(blockDim.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  value = warp_sum(value);
  __syncthreads();
  if (lane == 0) partial[threadIdx.x / 32] = value;
  __syncthreads();
  return warp_sum(lane < warps ? partial[lane] : T(0));
}

// Calls f(T{}) with the type of `dtype`.
template <class F>
decltype(auto) for_dtype(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::BFloat16:
      return f(__nv_bfloat16{});
    case Dtype::Float16:
      return f(__half{});
    default:
      return f(float{});
  }
}

constexpr size_t kSharedLimit = 166912;  // bytes that a block can have on sm_80, the smallest limit

// Starts `kernel` with `args`, each converted to the kernel's parameter. An empty grid is no
// launch.
template <class... Parameters, class... Args>
void launch_kernel(const char* text, void (*kernel)(Parameters...), dim3 grid, dim3 block,
                   size_t shared_bytes, Stream stream, const Args&... args) {
  static_assert(sizeof...(Parameters) == sizeof...(Args), "the kernel takes other arguments");
  const auto fail = [&](const std::string& what) {
    throw std::runtime_error("launch of " + std::string(text) + ": " + what);
  };
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
    fail("a grid of " + std::to_string(grid.x) + " x " + std::to_string(grid.y) + " x " +
         std::to_string(grid.z) + " blocks is too large");
  if (shared_bytes > kSharedLimit)
    fail(std::to_string(shared_bytes) + " bytes of shared memory are too many");
#ifdef FASTDIFF_EMULATE
  (void)stream;
  emulation::launch(text, grid, block, shared_bytes,
                    [&] { kernel(static_cast<Parameters>(args)...); });
#else
  const auto check = [&](cudaError_t error) {
    if (error != cudaSuccess) fail(cudaGetErrorString(error));
  };
  if (shared_bytes > 48 * 1024)
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                               cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shared_bytes)));
  [&](Parameters... converted) {
    void* pointers[] = {const_cast<void*>(static_cast<const void*>(&converted))..., nullptr};
    check(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, block, pointers,
                           shared_bytes, static_cast<cudaStream_t>(stream)));
  }(static_cast<Parameters>(args)...);
  check(cudaGetLastError());
#endif
}

}  // namespace fastdiff::cuda

// FASTDIFF_LAUNCH(kernel, grid, block, shared_bytes, stream, args...); `kernel` may be a template's
// name with its arguments. Throws std::runtime_error where the launch fails.
#define FASTDIFF_LAUNCH(...) ::fastdiff::cuda::launch_kernel(#__VA_ARGS__, __VA_ARGS__)
