// 2^x and the activations that are made of it.
//
// There are two exponentials, since their errors count differently. exp2_values is as exact as the
// type T that its result is rounded to: bfloat16 and float16 need fewer terms, and float64 takes
// the library's. exp2_lanes is for what is summed up in float32 before it is rounded, whatever the
// type: softmax, and the SiLU and GELU around a product. Its error is 9.1e-8 beside 1.5e-7.
#pragma once

#include "cpu/kernels/vectors.h"

namespace fastdiff::CPU_CAPABILITY {

constexpr double kLog2e = 1.4426950408889634;

// 2^t = 2^n 2^f with n the integer below t. 2^f is a minimax polynomial over [0, 1) (fitted by
// Lawson's reweighted least squares): relative error 7.5e-8 for degree 5 (1.5e-7 as evaluated in
// float32), 2.6e-6 for 4 and 7.5e-5 for 3. NaN is kept; results below 2^-126 may be 0 or 2^-126.
template <int kDegree, class V>
FASTDIFF_INLINE V exp2_by_floor(const V& t) {
#ifdef CPU_CAPABILITY_AVX512
  const auto fraction =
      _mm512_reduce_ps(reinterpret_cast<__m512>(t), _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  const V f = reinterpret_cast<V>(fraction);
#else
  const V bounded = at_most(at_least(t, fill_lanes<V>(-126.f)), fill_lanes<V>(127.f));
  const V n = from_torch<V>(to_torch(bounded).floor()), f = bounded - n;
#endif
  const auto horner = [&](float first, auto... others) FASTDIFF_HOT {
    V p = fill_lanes<V>(first);
    ((p = fmadd(p, f, fill_lanes<V>(others))), ...);
    return p;
  };
  V p;
  if constexpr (kDegree == 3) {
    p = horner(7.802452147006989e-2f, 2.2606715559959412e-1f, 6.958335638046265e-1f,
               9.999251961708069e-1f);
  } else if constexpr (kDegree == 4) {
    p = horner(1.3534167781472206e-2f, 5.2011460065841675e-2f, 2.414427548646927e-1f,
               6.930038332939148e-1f, 1.0000026226043701f);
  } else {
    p = horner(1.8775766948238015e-3f, 8.98933969438076e-3f, 5.582631751894951e-2f,
               2.4015361070632935e-1f, 6.931530833244324e-1f, 9.999999403953552e-1f);
  }
#ifdef CPU_CAPABILITY_AVX512
  // By 2^floor(t).
  return reinterpret_cast<V>(
      _mm512_scalef_ps(reinterpret_cast<__m512>(p), reinterpret_cast<__m512>(t)));
#else
  // Adding 1.5 * 2^23 + 127 leaves n + 127 in the low bits, which shifted into the exponent is 2^n.
  using I __attribute__((vector_size(sizeof(V)))) = int32_t;
  return p * reinterpret_cast<V>(reinterpret_cast<I>(n + 12583039.f) << 23);
#endif
}

// 2^t with an error well under half a unit of T.
template <class T>
FASTDIFF_INLINE Values<T> exp2_values(const Values<T>& t) {
  using V = typename Lanes<T>::V;
  return Values<T>::each(
      [](const V& x) FASTDIFF_HOT {
        if constexpr (std::is_same_v<T, double>) {
          return from_torch<V>(to_torch(x).exp2());
        } else {
          constexpr int kDegree = sizeof(T) == 4 ? 5 : std::is_same_v<T, c10::BFloat16> ? 3 : 4;
          return exp2_by_floor<kDegree>(x);
        }
      },
      t);
}

// 2^x = 2^n 2^f with n the nearest integer. 2^f over [-1/2, 1/2] is 1 + f q(f), q fitted by
// Lawson's reweighted least squares: relative error 9.1e-8. NaN is kept; from 127 on the result is
// 2^127, unless `kNegative` says that there is nothing above 0; below -126 it may be 0 or 2^-126.
template <bool kNegative = false>
FASTDIFF_INLINE F exp2_lanes(F x) {
  using I = int32_t __attribute__((vector_size(sizeof(F))));
  constexpr float kRound = 12582912.f;  // 1.5 * 2^23: added, it leaves n in the low bits
  x = at_least(x, fill_lanes<F>(-126.f));
  if constexpr (!kNegative) x = at_most(x, fill_lanes<F>(127.f));
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

// Phi(x) and its derivative: the normal distribution and its density.
struct Normal {
  F distribution, density;
};

// Of z = |x|, Phi(-z) = t q(t) exp(-z^2 / 2) with t = 1 / (1 + 0.28 z), the form of Abramowitz &
// Stegun 1964, 7.1.26; q fitted by Lawson's reweighted least squares: the error of Phi is 5e-9.
FASTDIFF_INLINE Normal normal(F x) {
  const F z = x < 0.f ? -x : x, t = 1.f / (1.f + 0.28f * z);
  F q = -0.10703231973295776f * t + 0.39492538759195756f;
  q = q * t - 0.24527781458532627f;
  q = q * t + 0.2756577705600528f;
  q = q * t + 0.06476794089334095f;
  q = q * t + 0.11695901732546929f;
  const F power = exp2_lanes<true>(z * z * static_cast<float>(-kLog2e / 2));
  F tail = q * t * power;
  tail = z < 13.f ? tail : F{};  // beyond, the exponential is no longer exact and Phi no float
  return {x < 0.f ? tail : 1.f - tail, (z < 13.f ? power : F{}) * 0.3989422804014327f};
}

// x * Phi(x) (Hendrycks & Gimpel 2016, arXiv:1606.08415); its error is 5e-9 |x|.
FASTDIFF_INLINE F gelu(F x) { return x * normal(x).distribution; }

}  // namespace fastdiff::CPU_CAPABILITY
