// The part of CUDA that fastdiff's kernels use, on the host: for tests only.
//
// Every CUDA thread of a block is a fiber, or with -DFASTDIFF_EMULATE_THREADS a thread of the
// system, which lets ThreadSanitizer see a missing barrier as the race that it is. Blocks run one
// after the other. What is undefined on a device is an error here, thrown by the launch:
//   - a barrier or an exchange that some of its threads never reach, or reach elsewhere;
//   - a shuffle that reads a lane outside its mask;
//   - a load or store that is not aligned to its size (only those of device.cuh are seen).
// Shared memory is filled with NaN before each block. Shuffles and votes order no memory, as on a
// device: only __syncwarp and __syncthreads do.
//
// The state is in emulation.cpp; shared variables are static ones, which the link gathers in one
// section (shared.ld): so a kernel's file may have no other mutable static variables.
#pragma once

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <source_location>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __shared__ static
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace fastdiff::cuda::emulation {

using Where = std::source_location;

// A CUDA thread's coordinates.
struct Thread {
  dim3 thread, block, block_size, grid_size;
};

#ifdef FASTDIFF_EMULATE_THREADS
extern thread_local constinit Thread* self;
#else
extern constinit Thread* self;
#endif

void launch(const char* text, dim3 grid, dim3 block, size_t shared_bytes,
            const std::function<void()>& kernel);
void* dynamic_shared();

void count_load(const void* at, size_t bytes);
void count_store(const void* at, size_t bytes);

// Waits for all threads of the block; whether any of them came with a non-zero value.
bool barrier(bool value, const Where& where);
// Waits for all lanes of the mask. With `order`, what they wrote before is seen by all after.
void meet_lanes(unsigned mask, bool order, const Where& where);
// Gives `value` to the lanes of the mask and takes the value of lane `from`.
uint64_t exchange(unsigned mask, uint64_t value, int from, const Where& where);
// The lanes of the mask that came with true.
unsigned ballot(unsigned mask, bool value, const Where& where);
int lane();

template <class T>
T shuffle(unsigned mask, T value, int from, const Where& where) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = exchange(mask, bits, from, where);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace fastdiff::cuda::emulation

#define threadIdx (::fastdiff::cuda::emulation::self->thread)
#define blockIdx (::fastdiff::cuda::emulation::self->block)
#define blockDim (::fastdiff::cuda::emulation::self->block_size)
#define gridDim (::fastdiff::cuda::emulation::self->grid_size)
constexpr int warpSize = 32;

using FastdiffWhere = std::source_location;  // of the call, as a default argument

inline void __syncthreads(FastdiffWhere where = FastdiffWhere::current()) {
  fastdiff::cuda::emulation::barrier(false, where);
}
inline int __syncthreads_or(int value, FastdiffWhere where = FastdiffWhere::current()) {
  return fastdiff::cuda::emulation::barrier(value != 0, where);
}
inline int __syncthreads_and(int value, FastdiffWhere where = FastdiffWhere::current()) {
  return !fastdiff::cuda::emulation::barrier(value == 0, where);
}
inline void __syncwarp(unsigned mask = 0xffffffffu,
                       FastdiffWhere where = FastdiffWhere::current()) {
  fastdiff::cuda::emulation::meet_lanes(mask, true, where);
}

// A source lane outside the sub-warp of `width` lanes means the lane itself.
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32,
              FastdiffWhere where = FastdiffWhere::current()) {
  const int lane = fastdiff::cuda::emulation::lane(), first = lane & ~(width - 1);
  return fastdiff::cuda::emulation::shuffle(mask, value, first + (source & (width - 1)), where);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32,
                  FastdiffWhere where = FastdiffWhere::current()) {
  const int lane = fastdiff::cuda::emulation::lane(), source = lane ^ lanes;
  const bool inside = source < (lane & ~(width - 1)) + width;
  return fastdiff::cuda::emulation::shuffle(mask, value, inside ? source : lane, where);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned lanes, int width = 32,
                   FastdiffWhere where = FastdiffWhere::current()) {
  const int lane = fastdiff::cuda::emulation::lane(), by = static_cast<int>(lanes);
  const bool inside = (lane & (width - 1)) + by < width;
  return fastdiff::cuda::emulation::shuffle(mask, value, inside ? lane + by : lane, where);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned lanes, int width = 32,
                 FastdiffWhere where = FastdiffWhere::current()) {
  const int lane = fastdiff::cuda::emulation::lane(), by = static_cast<int>(lanes);
  const bool inside = (lane & (width - 1)) >= by;
  return fastdiff::cuda::emulation::shuffle(mask, value, inside ? lane - by : lane, where);
}

inline unsigned __ballot_sync(unsigned mask, int value,
                              FastdiffWhere where = FastdiffWhere::current()) {
  return fastdiff::cuda::emulation::ballot(mask, value != 0, where);
}
inline int __any_sync(unsigned mask, int value, FastdiffWhere where = FastdiffWhere::current()) {
  return fastdiff::cuda::emulation::ballot(mask, value != 0, where) != 0;
}
inline int __all_sync(unsigned mask, int value, FastdiffWhere where = FastdiffWhere::current()) {
  return fastdiff::cuda::emulation::ballot(mask, value == 0, where) == 0;
}

// Integers only: a sum of floats would depend on the order.
template <class T>
T atomicAdd(T* at, std::type_identity_t<T> value) {
  static_assert(std::is_integral_v<T>);
  return __atomic_fetch_add(at, value, __ATOMIC_RELAXED);
}

inline int __popc(unsigned value) { return std::popcount(value); }
inline int __popcll(unsigned long long value) { return std::popcount(value); }
inline int __clz(int value) { return std::countl_zero(static_cast<unsigned>(value)); }
inline int __ffs(int value) {
  return value == 0 ? 0 : std::countr_zero(static_cast<unsigned>(value)) + 1;
}
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32);
}
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}

inline unsigned __float_as_uint(float value) { return std::bit_cast<unsigned>(value); }
inline float __uint_as_float(unsigned bits) { return std::bit_cast<float>(bits); }
inline int __float_as_int(float value) { return std::bit_cast<int>(value); }
inline float __int_as_float(int bits) { return std::bit_cast<float>(bits); }

// The compiler is given no licence to contract a * b + c, so these are the plain operations.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float a) { return std::exp(a); }
inline float __logf(float a) { return std::log(a); }
inline float rsqrtf(float a) { return 1.0f / std::sqrt(a); }
inline double rsqrt(double a) { return 1.0 / std::sqrt(a); }

template <class A, class B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  static_assert(std::is_signed_v<A> == std::is_signed_v<B>, "min of signed and unsigned");
  return b < a ? b : a;
}
template <class A, class B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  static_assert(std::is_signed_v<A> == std::is_signed_v<B>, "max of signed and unsigned");
  return a < b ? b : a;
}

struct __nv_bfloat16 {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 value) {
  return std::bit_cast<float>(static_cast<uint32_t>(value.bits) << 16);
}
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  const auto bits = std::bit_cast<uint32_t>(value);
  if (std::isnan(value)) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16)};
}
inline __nv_bfloat16 __float2bfloat16(float value) { return __float2bfloat16_rn(value); }

struct __half {
  uint16_t bits;
};

inline float __half2float(__half value) {
  const int exponent = value.bits >> 10 & 31, fraction = value.bits & 1023;
  const float size = exponent == 31 ? (fraction ? NAN : INFINITY)
                     : exponent == 0
                         ? std::ldexp(static_cast<float>(fraction), -24)
                         : std::ldexp(static_cast<float>(fraction + 1024), exponent - 25);
  return std::copysign(size, value.bits & 0x8000 ? -1.0f : 1.0f);
}
inline __half __float2half_rn(float value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const float size = std::fabs(value);
  if (std::isnan(value)) return {0x7fff};
  if (size >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00)};
  // nearbyint rounds to the nearest, ties to even, and a carry moves on to the next exponent.
  const int exponent = size < 0x1p-14f ? -14 : std::ilogb(size);
  const auto units = static_cast<int>(std::nearbyint(std::ldexp(size, 10 - exponent)));
  return {static_cast<uint16_t>(sign | (units + ((exponent + 14) << 10)))};
}
inline __half __float2half(float value) { return __float2half_rn(value); }

using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
