// The vectors that every kernel here computes with: the compiler's own vector types, whose + - * /
// are its operators, so that arrays of them stay in registers.
//
// F is a register of float32. `Values<T>` is as many values of any floating type T as one of
// PyTorch's vectors of T has; bfloat16 and float16 are widened to float32 when they are loaded and
// rounded once when they are stored. What C++ has no operator for is taken from at::vec.
//
// Everything is in the instruction set's own namespace, so that no two variants of a function share
// a name.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

namespace fastdiff::CPU_CAPABILITY {

#define FASTDIFF_HOT __attribute__((always_inline))  // after a lambda's parameters
#define FASTDIFF_INLINE inline FASTDIFF_HOT

#if defined(CPU_CAPABILITY_AVX512)
constexpr int64_t kLanes = 16;  // of F
#elif defined(CPU_CAPABILITY_AVX2)
constexpr int64_t kLanes = 8;
#else
constexpr int64_t kLanes = 4;
#endif
constexpr int64_t kLine = 16;  // floats of a cache line

constexpr int64_t rounded_up(int64_t value, int64_t step) {
  return (value + step - 1) / step * step;
}

using F = float __attribute__((vector_size(kLanes * 4)));

template <class V>
using LaneOf = std::remove_cvref_t<decltype(std::declval<V&>()[0])>;

template <class V>
constexpr int64_t lanes_of = sizeof(V) / sizeof(LaneOf<V>);

// A vector as at::vec has it, and back. V has as many lanes as PyTorch's vector of the same type.
template <class V>
FASTDIFF_INLINE at::vec::Vectorized<LaneOf<V>> to_torch(const V& value) {
  static_assert(sizeof(V) == sizeof(at::vec::Vectorized<LaneOf<V>>));
  return at::vec::Vectorized<LaneOf<V>>::loadu(&value);
}

template <class V>
FASTDIFF_INLINE V from_torch(const at::vec::Vectorized<LaneOf<V>>& value) {
  static_assert(sizeof(V) == sizeof(value));
  V out;
  value.store(&out);
  return out;
}

template <class V>
FASTDIFF_INLINE V fill_lanes(LaneOf<V> value) {
  return value - V{};
}

template <class V = F, class T>
FASTDIFF_INLINE V load_lanes(const T* p) {
  V out;
  if constexpr (std::is_same_v<T, LaneOf<V>>) {
    __builtin_memcpy(&out, p, sizeof(out));
  } else {  // a bfloat16 is the upper half of a float
    static_assert(std::is_same_v<V, F>);
#if defined(CPU_CAPABILITY_AVX512)
    const auto half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    out = reinterpret_cast<F>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
#elif defined(CPU_CAPABILITY_AVX2)
    const auto half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    out = reinterpret_cast<F>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
#else
    for (int64_t i = 0; i < kLanes; ++i) out[i] = static_cast<float>(p[i]);
#endif
  }
  return out;
}

template <class T, class V>
FASTDIFF_INLINE void store_lanes(T* p, V value) {
  if constexpr (std::is_same_v<T, LaneOf<V>>) {
    __builtin_memcpy(p, &value, sizeof(value));
  } else {
    static_assert(std::is_same_v<V, F>);
#if defined(__AVX512BF16__)
    const auto half =
        reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(reinterpret_cast<__m512>(value)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), half);
#elif defined(CPU_CAPABILITY_AVX512)
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

// The first `count` lanes only, all of them if `count` is larger; the others are zero.
template <class V = F, class T>
FASTDIFF_INLINE V load_lanes(const T* p, int64_t count) {
  if (count >= lanes_of<V>) return load_lanes<V>(p);
  V out{};
  for (int64_t i = 0; i < count; ++i) out[i] = static_cast<LaneOf<V>>(p[i]);
  return out;
}

template <class T, class V>
FASTDIFF_INLINE void store_lanes(T* p, V value, int64_t count) {
  if (count >= lanes_of<V>) return store_lanes(p, value);
  for (int64_t i = 0; i < count; ++i) p[i] = static_cast<T>(value[i]);
}

// a * b + c, rounded once where the instruction set can.
template <class V>
FASTDIFF_INLINE V fmadd(const V& a, const V& b, const V& c) {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  return from_torch<V>(at::vec::fmadd(to_torch(a), to_torch(b), to_torch(c)));
#else
  return a * b + c;
#endif
}

// x, but `low` where x is less; NaN is kept. As an instruction, since GCC makes a comparison and a
// choice of what C++ can say.
template <class V>
FASTDIFF_INLINE V at_least(const V& x, const V& low) {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  return from_torch<V>(at::vec::clamp_min(to_torch(x), to_torch(low)));
#else
  return x < low ? low : x;
#endif
}

// x, but `high` where x is more; NaN is kept.
template <class V>
FASTDIFF_INLINE V at_most(const V& x, const V& high) {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  return from_torch<V>(at::vec::clamp_max(to_torch(x), to_torch(high)));
#else
  return x > high ? high : x;
#endif
}

template <class V>
FASTDIFF_INLINE LaneOf<V> sum_lanes(const V& value) {
  using At = at::vec::Vectorized<LaneOf<V>>;
  return at::vec::vec_reduce_all<LaneOf<V>>([](const At& a, const At& b) { return a + b; },
                                            to_torch(value));
}

// T's values are computed with as `Wide`, in vectors V of which `vectors` hold the `size` values
// that one of PyTorch's vectors of T has.
template <class T>
struct Lanes {
  using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;
  static constexpr int64_t size = at::vec::Vectorized<T>::size();
  static constexpr int vectors = sizeof(Wide) / sizeof(T);
  using V __attribute__((vector_size(sizeof(at::vec::Vectorized<T>)))) = Wide;
};

template <class T>
struct Values {
  using Wide = typename Lanes<T>::Wide;
  using V = typename Lanes<T>::V;
  static constexpr int64_t size = Lanes<T>::size;
  static constexpr int vectors = Lanes<T>::vectors;
  V vector[vectors];

  Values() = default;
  FASTDIFF_INLINE Values(const V& value) {  // the same vector throughout
    for (auto& each : vector) each = value;
  }
  explicit FASTDIFF_INLINE Values(Wide value) : Values(fill_lanes<V>(value)) {}

  // The first `count` values; the others are zero.
  static FASTDIFF_INLINE Values load(const T* p, int64_t count = size) {
    using At = at::vec::Vectorized<T>;
    const At values = count == size ? At::loadu(p) : At::loadu(p, count);
    Values out;
    if constexpr (vectors == 1) {
      out.vector[0] = from_torch<V>(values);
    } else {
      const auto [low, high] = at::vec::convert_to_float<T>(values);
      out.vector[0] = from_torch<V>(low);
      out.vector[1] = from_torch<V>(high);
    }
    return out;
  }

  // Of values that are in the wide type already. They may be read past those that are wanted:
  // arrays of them are padded to whole `size`.
  static FASTDIFF_INLINE Values load_wide(const Wide* p) {
    Values out;
    for (int i = 0; i < vectors; ++i) out.vector[i] = load_lanes<V>(p + i * lanes_of<V>);
    return out;
  }

  static FASTDIFF_INLINE Values load_wide(const Wide* p, int64_t count) {
    if (count == size) return load_wide(p);
    using At = at::vec::Vectorized<Wide>;
    Values out;
    for (int i = 0; i < vectors; ++i) {
      const int64_t left = std::clamp<int64_t>(count - i * lanes_of<V>, 0, lanes_of<V>);
      out.vector[i] = left == 0 ? V{} : from_torch<V>(At::loadu(p + i * lanes_of<V>, left));
    }
    return out;
  }

  FASTDIFF_INLINE void store(T* p, int64_t count = size) const {
    const auto values = narrowed();
    if (count == size) {
      values.store(p);
    } else {
      values.store(p, static_cast<int>(count));
    }
  }

  FASTDIFF_INLINE void store_wide(Wide* p) const {
    for (int i = 0; i < vectors; ++i) store_lanes(p + i * lanes_of<V>, vector[i]);
  }

  FASTDIFF_INLINE void store_wide(Wide* p, int64_t count) const {
    if (count == size) return store_wide(p);
    for (int i = 0; i < vectors; ++i) {
      const int64_t left = std::min(count - i * lanes_of<V>, lanes_of<V>);
      if (left > 0) to_torch(vector[i]).store(p + i * lanes_of<V>, static_cast<int>(left));
    }
  }

  // Sets the values from `count` on to zero, so that they add nothing to a sum.
  FASTDIFF_INLINE void keep(int64_t count) {
    if (count == size) return;
    Wide lanes[size];
    store_wide(lanes);
    for (int64_t i = count; i < size; ++i) lanes[i] = 0;
    *this = load_wide(lanes);
  }

  // operation(vectors of each of `operands`), vector by vector.
  template <class Operation, class... Operands>
  static FASTDIFF_INLINE Values each(Operation&& operation, const Operands&... operands) {
    Values out;
    for (int i = 0; i < vectors; ++i) out.vector[i] = operation(operands.vector[i]...);
    return out;
  }

  // A vector V as an operand stands for Values of the same vector throughout.
  friend FASTDIFF_INLINE Values operator+(const Values& a, const Values& b) {
    return each([](const V& x, const V& y) FASTDIFF_HOT { return x + y; }, a, b);
  }
  friend FASTDIFF_INLINE Values operator-(const Values& a, const Values& b) {
    return each([](const V& x, const V& y) FASTDIFF_HOT { return x - y; }, a, b);
  }
  friend FASTDIFF_INLINE Values operator*(const Values& a, const Values& b) {
    return each([](const V& x, const V& y) FASTDIFF_HOT { return x * y; }, a, b);
  }
  friend FASTDIFF_INLINE Values operator/(const Values& a, const Values& b) {
    return each([](const V& x, const V& y) FASTDIFF_HOT { return x / y; }, a, b);
  }
  friend FASTDIFF_INLINE Values fmadd(const Values& a, const Values& b, const Values& c) {
    return each([](const V& x, const V& y, const V& z)
                    FASTDIFF_HOT { return CPU_CAPABILITY::fmadd<V>(x, y, z); },
                a, b, c);
  }

 private:
  FASTDIFF_INLINE at::vec::Vectorized<T> narrowed() const {
    if constexpr (vectors == 1) {
      return to_torch(vector[0]);
    } else {
#ifdef __AVX512BF16__
      if constexpr (std::is_same_v<T, c10::BFloat16>)
        return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(vector[1]),
                                                             reinterpret_cast<__m512>(vector[0])));
#endif
      return at::vec::convert_from_float<T>(to_torch(vector[0]), to_torch(vector[1]));
    }
  }
};

// Calls body(i, count) for the Values of elements 0..n-1: count is their size, and less for the
// last ones.
template <class T, class Body>
FASTDIFF_INLINE void for_values(int64_t n, Body&& body) {
  int64_t i = 0;
  for (; i + Lanes<T>::size <= n; i += Lanes<T>::size) body(i, Lanes<T>::size);
  if (i < n) body(i, n - i);
}

}  // namespace fastdiff::CPU_CAPABILITY
