// Vectors of any floating type as vectors of the type that is computed in.
//
// bfloat16 and float16 are widened to float32 when loaded and rounded once when stored; one block
// of T is one Vectorized<T>, held as `parts` vectors of the wide type. Everything is in the
// instruction set's own namespace, so that no two variants of a function share a name.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <c10/core/ScalarType.h>

#include <cstdint>
#include <type_traits>

namespace fastdiff::CPU_CAPABILITY {

using at::vec::Vectorized;

#define FASTDIFF_HOT __attribute__((always_inline))  // after a lambda's parameters
#define FASTDIFF_INLINE inline FASTDIFF_HOT

// `digits`: degree of the polynomial for 2^f, whose error is well under half a unit of T.
template <class T>
struct Lanes {
  using Wide = float;
  using V = Vectorized<float>;
  static constexpr int64_t size = Vectorized<T>::size();  // elements of T in a block
  static constexpr int parts = 2;
  static constexpr int digits = std::is_same_v<T, c10::BFloat16> ? 3 : 4;
};
template <>
struct Lanes<float> {
  using Wide = float;
  using V = Vectorized<float>;
  static constexpr int64_t size = V::size();
  static constexpr int parts = 1;
  static constexpr int digits = 5;
};
template <>
struct Lanes<double> {
  using Wide = double;
  using V = Vectorized<double>;
  static constexpr int64_t size = V::size();
  static constexpr int parts = 1;
  static constexpr int digits = 0;  // the library's
};

template <class T>
FASTDIFF_INLINE Vectorized<T> narrowed(const Vectorized<float>& low,
                                       const Vectorized<float>& high) {
#ifdef __AVX512BF16__
  if constexpr (std::is_same_v<T, c10::BFloat16>)
    return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
#endif
  return at::vec::convert_from_float<T>(low, high);
}

// One block: `size` elements of T in the wide type.
template <class T>
struct Block {
  using V = typename Lanes<T>::V;
  V part[Lanes<T>::parts];

  static FASTDIFF_INLINE Block load(const T* p, int64_t count = Lanes<T>::size) {
    Block out;
    if constexpr (Lanes<T>::parts == 1) {
      out.part[0] = count == Lanes<T>::size ? V::loadu(p) : V::loadu(p, count);
    } else {
      using N = Vectorized<T>;
      const N narrow = count == Lanes<T>::size ? N::loadu(p) : N::loadu(p, count);
      auto [low, high] = at::vec::convert_to_float<T>(narrow);
      out.part[0] = low;
      out.part[1] = high;
    }
    return out;
  }

  // Coefficients are kept in the wide type already. They may be read past `count`: arrays of them
  // are padded to a whole block.
  static FASTDIFF_INLINE Block load_wide(const typename Lanes<T>::Wide* p) {
    Block out;
    for (int r = 0; r < Lanes<T>::parts; ++r) out.part[r] = V::loadu(p + r * V::size());
    return out;
  }

  static FASTDIFF_INLINE Block fill(typename Lanes<T>::Wide value) {
    Block out;
    for (int r = 0; r < Lanes<T>::parts; ++r) out.part[r] = V(value);
    return out;
  }

  FASTDIFF_INLINE void store(T* p, int64_t count = Lanes<T>::size) const {
    if constexpr (Lanes<T>::parts == 1) {
      if (count == Lanes<T>::size) {
        part[0].store(p);
      } else {
        part[0].store(p, static_cast<int>(count));
      }
    } else {
      const Vectorized<T> narrow = narrowed<T>(part[0], part[1]);
      if (count == Lanes<T>::size) {
        narrow.store(p);
      } else {
        narrow.store(p, static_cast<int>(count));
      }
    }
  }

  // Sets the elements from `count` on to zero, so that they add nothing to a sum.
  FASTDIFF_INLINE void keep(int64_t count) {
    if (count == Lanes<T>::size) return;
    typename Lanes<T>::Wide lanes[Lanes<T>::size];
    store_wide(lanes);
    for (int64_t i = count; i < Lanes<T>::size; ++i) lanes[i] = 0;
    *this = load_wide(lanes);
  }

  FASTDIFF_INLINE void store_wide(typename Lanes<T>::Wide* p) const {
    for (int r = 0; r < Lanes<T>::parts; ++r) part[r].store(p + r * V::size());
  }
};

// Calls body(i, count) for the blocks of 0..n-1: count is the constant block size but for the last.
template <class T, class Body>
FASTDIFF_INLINE void for_blocks(int64_t n, Body&& body) {
  constexpr int64_t size = Lanes<T>::size;
  int64_t i = 0;
  for (; i + size <= n; i += size) body(i, size);
  if (i < n) body(i, n - i);
}

template <class V>
FASTDIFF_INLINE typename V::value_type sum_lanes(const V& v) {
  return at::vec::vec_reduce_all<typename V::value_type>(
      [](const V& a, const V& b) { return a + b; }, v);
}

// 2^t = 2^n 2^f with n the integer below t. 2^f is a minimax polynomial over [0, 1) (fitted by
// Lawson's reweighted least squares): relative error 7.5e-8 for degree 5 (1.5e-7 as evaluated in
// float32), 2.6e-6 for 4 and 7.5e-5 for 3. NaN is kept; results below 2^-126 may be 0 or 2^-126.
template <int kDegree>
FASTDIFF_INLINE Vectorized<float> exp2_of(const Vectorized<float>& t) {
  using V = Vectorized<float>;
  using at::vec::fmadd;
#ifdef CPU_CAPABILITY_AVX512
  const V f = _mm512_reduce_ps(t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
#else
  const V bounded = at::vec::clamp(t, V(-126.f), V(127.f));
  const V n = bounded.floor(), f = bounded - n;
#endif
  V p;
  if constexpr (kDegree == 3) {
    p = fmadd(V(7.802452147006989e-2f), f, V(2.2606715559959412e-1f));
    p = fmadd(p, f, V(6.958335638046265e-1f));
    p = fmadd(p, f, V(9.999251961708069e-1f));
  } else if constexpr (kDegree == 4) {
    p = fmadd(V(1.3534167781472206e-2f), f, V(5.2011460065841675e-2f));
    p = fmadd(p, f, V(2.414427548646927e-1f));
    p = fmadd(p, f, V(6.930038332939148e-1f));
    p = fmadd(p, f, V(1.0000026226043701f));
  } else {
    p = fmadd(V(1.8775766948238015e-3f), f, V(8.98933969438076e-3f));
    p = fmadd(p, f, V(5.582631751894951e-2f));
    p = fmadd(p, f, V(2.4015361070632935e-1f));
    p = fmadd(p, f, V(6.931530833244324e-1f));
    p = fmadd(p, f, V(9.999999403953552e-1f));
  }
#ifdef CPU_CAPABILITY_AVX512
  return _mm512_scalef_ps(p, t);  // by 2^floor(t)
#else
  // Adding 1.5 * 2^23 + 127 leaves n + 127 in the low bits, which shifted into the exponent is 2^n.
  const auto bits = at::vec::cast<int32_t>(n + V(12583039.f)) << Vectorized<int32_t>(23);
  return p * at::vec::cast<float>(bits);
#endif
}

template <int kDegree>
FASTDIFF_INLINE Vectorized<double> exp2_of(const Vectorized<double>& t) {
  return t.exp2();
}

// a / b to about the precision of T.
template <class T, class V>
FASTDIFF_INLINE V quotient(const V& a, const V& b) {
#ifdef CPU_CAPABILITY_AVX512
  if constexpr (Lanes<T>::parts == 2) return a * V(_mm512_rcp14_ps(b));  // to 6e-5
#endif
  return a / b;
}

constexpr double kLog2e = 1.4426950408889634;

// Calls body with a null pointer of the type that `dtype` names, as a tag.
template <class Body>
FASTDIFF_INLINE void for_dtype(c10::ScalarType dtype, Body&& body) {
  switch (dtype) {
    case c10::ScalarType::Double:
      return body(static_cast<double*>(nullptr));
    case c10::ScalarType::BFloat16:
      return body(static_cast<c10::BFloat16*>(nullptr));
    case c10::ScalarType::Half:
      return body(static_cast<c10::Half*>(nullptr));
    default:
      return body(static_cast<float*>(nullptr));
  }
}

}  // namespace fastdiff::CPU_CAPABILITY
