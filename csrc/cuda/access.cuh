// How the elementwise kernels choose the width of their accesses, and what fills a card.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <type_traits>

#include "cuda/device.cuh"

namespace fastdiff::cuda {

constexpr int kThreads = 256;  // the most in a block of these kernels

// With at least this many vectors a thread takes kUnroll of them: then half the threads that fit on
// the largest card remain, and each has enough bytes in flight. With fewer vectors a thread takes
// one, which spreads the work over more of the card.
constexpr int kUnroll = 4;
constexpr int64_t kManyVectors = int64_t{1} << 19;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The largest power of two, at most 16, of which all these addresses and sizes (in bytes) are
// multiples. A null pointer and 0 are multiples of everything.
template <class... Values>
int64_t common_alignment(Values... values) {
  const auto bits = [](auto value) {
    if constexpr (std::is_pointer_v<decltype(value)>)
      return reinterpret_cast<uintptr_t>(value);
    else
      return static_cast<uintptr_t>(value);
  };
  const uintptr_t all = (bits(values) | ... | 16);
  return static_cast<int64_t>(all & -all);
}

// Calls f(std::integral_constant<int, W>) with the number W of elements in an access of `alignment`
// bytes, from 16 bytes down to one element.
template <class T, class F>
void for_width(int64_t alignment, F f) {
  const int64_t width = alignment / static_cast<int64_t>(sizeof(T));
  if constexpr (kWidth<T> == 8) {
    if (width == 8) return f(std::integral_constant<int, 8>{});
  }
  if (width == 4) return f(std::integral_constant<int, 4>{});
  if (width == 2) return f(std::integral_constant<int, 2>{});
  f(std::integral_constant<int, 1>{});
}

// A grid whose x dimension walks over the `units` of an image, `each` of them per thread, and whose
// y dimension walks over the images. Kernels loop over y, since a grid has at most 65535 there.
struct FlatPlan {
  dim3 grid;
  int threads;
};

inline FlatPlan flat_plan(int64_t units, int64_t images, int each) {
  const int64_t wanted = ceil_div(units, each), blocks = ceil_div(wanted, kThreads);
  if (blocks == 0) return {dim3(0, 0, 0), 0};
  return {
      dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(std::min<int64_t>(images, 65535))),
      static_cast<int>(ceil_div(ceil_div(wanted, blocks), 32) * 32)};
}

// Division of numbers 0..2^63-1 by a divisor that the host knows, as a product (Granlund and
// Montgomery 1994): the device has no division, and takes a hundred instructions in 64 bits.
//
// With 2^shift the least power of two that is not below d, magic = ceil(2^(63+shift) / d) exceeds
// the quotient by less than 1, so that magic n / 2^(63+shift) exceeds n / d by less than 1 / d.
struct Divisor {
  uint64_t magic;
  int shift;

  explicit Divisor(int64_t d) {
    const auto divisor = static_cast<uint64_t>(d);
    shift = static_cast<int>(std::bit_width(divisor - 1));
    const auto power = static_cast<unsigned __int128>(1) << (63 + shift);
    magic = static_cast<uint64_t>((power + divisor - 1) / divisor);
  }

  __device__ __forceinline__ int64_t divide(int64_t n) const {
    return static_cast<int64_t>(__umul64hi(static_cast<uint64_t>(n) << 1, magic) >> shift);
  }
};

template <int N, class T>
__device__ __forceinline__ void to_floats(const Pack<T, N>& pack, float (&v)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) v[i] = to_float(pack.value[i]);
}

template <class T, int N>
__device__ __forceinline__ Pack<T, N> from_floats(const float (&v)[N]) {
  Pack<T, N> pack;
#pragma unroll
  for (int i = 0; i < N; ++i) pack.value[i] = from_float<T>(v[i]);
  return pack;
}

}  // namespace fastdiff::cuda
