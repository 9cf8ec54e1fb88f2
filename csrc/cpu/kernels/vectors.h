// Vectors of float32 for the convolutions, in the compiler's own vector type: loops over arrays of
// them stay in registers, which the micro-kernel of gemm.h lives by.
#pragma once

#include <algorithm>

#include "cpu/kernels/lanes.h"

namespace fastdiff::CPU_CAPABILITY {

#if defined(CPU_CAPABILITY_AVX512)
constexpr int64_t kLanes = 16;
#elif defined(CPU_CAPABILITY_AVX2)
constexpr int64_t kLanes = 8;
#else
constexpr int64_t kLanes = 4;
#endif
constexpr int64_t kLine = 16;  // floats of a cache line

using F = float __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));

template <class T>
FASTDIFF_INLINE F load_lanes(const T* p) {
  if constexpr (std::is_same_v<T, float>) {
    return *reinterpret_cast<const F*>(p);
  } else {  // a bfloat16 is the upper half of a float
    F out;
#if defined(CPU_CAPABILITY_AVX512)
    const auto half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    out = reinterpret_cast<F>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
#elif defined(CPU_CAPABILITY_AVX2)
    const auto half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    out = reinterpret_cast<F>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
#else
    for (int64_t i = 0; i < kLanes; ++i) out[i] = static_cast<float>(p[i]);
#endif
    return out;
  }
}

template <class T>
FASTDIFF_INLINE void store_lanes(T* p, F value) {
  if constexpr (std::is_same_v<T, float>) {
    *reinterpret_cast<F*>(p) = value;
  } else {
#if defined(CPU_CAPABILITY_AVX512)
    const auto half = at::vec::cvtfp32_bf16(reinterpret_cast<__m512>(value));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), half);
#elif defined(CPU_CAPABILITY_AVX2)
    const auto half = at::vec::cvtfp32_bf16(reinterpret_cast<__m256>(value));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), half);
#else
    for (int64_t i = 0; i < kLanes; ++i) p[i] = static_cast<T>(value[i]);
#endif
  }
}

// The first `count` lanes only; the others are zero.
template <class T>
FASTDIFF_INLINE F load_lanes(const T* p, int64_t count) {
  if (count >= kLanes) return load_lanes(p);
  F out{};
  for (int64_t i = 0; i < count; ++i) out[i] = static_cast<float>(p[i]);
  return out;
}

template <class T>
FASTDIFF_INLINE void store_lanes(T* p, F value, int64_t count) {
  if (count >= kLanes) return store_lanes(p, value);
  for (int64_t i = 0; i < count; ++i) p[i] = static_cast<T>(value[i]);
}

// x, but `low` where it is less, or `high` where it is more; NaN is kept. As instructions, since
// GCC makes a comparison and a choice of what C++ can say.
FASTDIFF_INLINE F at_least(F x, float low) {
#if defined(CPU_CAPABILITY_AVX512)
  return reinterpret_cast<F>(_mm512_max_ps(_mm512_set1_ps(low), reinterpret_cast<__m512>(x)));
#elif defined(CPU_CAPABILITY_AVX2)
  return reinterpret_cast<F>(_mm256_max_ps(_mm256_set1_ps(low), reinterpret_cast<__m256>(x)));
#else
  return x < low ? F{} + low : x;
#endif
}

FASTDIFF_INLINE F at_most(F x, float high) {
#if defined(CPU_CAPABILITY_AVX512)
  return reinterpret_cast<F>(_mm512_min_ps(_mm512_set1_ps(high), reinterpret_cast<__m512>(x)));
#elif defined(CPU_CAPABILITY_AVX2)
  return reinterpret_cast<F>(_mm256_min_ps(_mm256_set1_ps(high), reinterpret_cast<__m256>(x)));
#else
  return x > high ? F{} + high : x;
#endif
}

// 2^x = 2^n 2^f with n the nearest integer. 2^f over [-1/2, 1/2] is 1 + f q(f), q fitted by
// Lawson's reweighted least squares: relative error 9.1e-08. NaN is kept; from 127 on the result is
// 2^127, unless `kNegative` says that there is nothing above 0; below -126 it may be 0 or 2^-126.
template <bool kNegative = false>
FASTDIFF_INLINE F exp2_lanes(F x) {
  using I = int32_t __attribute__((vector_size(kLanes * 4), may_alias));
  constexpr float kRound = 12582912.f;  // 1.5 * 2^23: added, it leaves n in the low bits
  x = at_least(x, -126.f);
  if constexpr (!kNegative) x = at_most(x, 127.f);
  const F shifted = x + kRound, f = x - (shifted - kRound);
  F q = 0.001326472731307149f * f + 0.009671512991189957f;
  q = q * f + 0.05550733581185341f;
  q = q * f + 0.24022242426872253f;
  q = q * f + 0.6931470036506653f;
  const I power = (reinterpret_cast<I>(shifted) << 23) + 0x3F800000;
  return (q * f + 1.f) * reinterpret_cast<F>(power);
}

// x * sigmoid(x).
FASTDIFF_INLINE F silu(F x) { return x / (1.f + exp2_lanes(x * static_cast<float>(-kLog2e))); }

// x * Phi(x), Phi being the normal distribution (Hendrycks & Gimpel 2016, arXiv:1606.08415). Of
// z = |x|, Phi(-z) = t q(t) exp(-z^2 / 2) with t = 1 / (1 + 0.28 z), the form of Abramowitz &
// Stegun 1964, 7.1.26; q fitted by Lawson's reweighted least squares: the result's error is 5e-9 z.
FASTDIFF_INLINE F gelu(F x) {
  const F z = x < 0.f ? -x : x, t = 1.f / (1.f + 0.28f * z);
  F q = -0.10703231973295776f * t + 0.39492538759195756f;
  q = q * t - 0.24527781458532627f;
  q = q * t + 0.2756577705600528f;
  q = q * t + 0.06476794089334095f;
  q = q * t + 0.11695901732546929f;
  F tail = q * t * exp2_lanes<true>(z * z * static_cast<float>(-kLog2e / 2));
  tail = z < 13.f ? tail : F{};  // beyond, the exponential is no longer exact and Phi no float
  return x * (x < 0.f ? tail : 1.f - tail);
}

}  // namespace fastdiff::CPU_CAPABILITY
