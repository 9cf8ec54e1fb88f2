// Philox4x32-10 (Salmon et al. 2011) and the normal values made of it (Box and Muller 1958).
//
// A counter (group, image, row) under a key of two words gives four words, so four normal values.
// Sixteen counters are computed side by side, in one array for each of the four words. Each step is
// then the same operation on sixteen elements, which the compiler turns into vector instructions of
// any instruction set.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

#include "cpu/kernels/vectors.h"

namespace fastdiff::CPU_CAPABILITY {

constexpr int64_t kPhiloxLanes = 16;
constexpr int64_t kPhiloxValues = 4 * kPhiloxLanes;  // made at a time

// a = sqrt(-2 ln(1 - u)) cos(2 pi v) and b the sine likewise, of u and v in units of 2^-24.
//
// In float32 nothing is lost on the way to the polynomials: 1 - u and the distance of v from the
// nearest quarter turn are exact. They are minimax in the relative error (fitted by Lawson's
// reweighted least squares), which is below 3.2e-8 for the logarithm between sqrt(1/2) and sqrt(2),
// and below 3.3e-9 for the sine and the cosine up to an eighth of a turn.
static FASTDIFF_INLINE void box_muller(const uint32_t (&u)[kPhiloxLanes],
                                       const uint32_t (&v)[kPhiloxLanes], float (&a)[kPhiloxLanes],
                                       float (&b)[kPhiloxLanes]) {
  float radius[kPhiloxLanes];
  for (int64_t i = 0; i < kPhiloxLanes; ++i) {
    const auto x = static_cast<float>(static_cast<int32_t>((1 << 24) - u[i]));  // 2^24 (1 - u)
    const auto bits = std::bit_cast<int32_t>(x);
    const int32_t exponent = (bits - 0x3F3504F3) >> 23;  // x = 2^exponent (1 + f)
    const float f = std::bit_cast<float>(bits - (exponent << 23)) - 1;
    float p = 0.08700435608625412f;
    p = p * f - 0.14267486333847046f;
    p = p * f + 0.14914767444133759f;
    p = p * f - 0.1657758504152298f;
    p = p * f + 0.19963063299655914f;
    p = p * f - 0.2500133812427521f;
    p = p * f + 0.3333390951156616f;
    p = f * f * (f * p - 0.5f) + f;
    radius[i] = -2 * (static_cast<float>(exponent - 24) * 0.6931471805599453f + p);
  }
  using V = Lanes<float>::V;
  for (int64_t i = 0; i < kPhiloxLanes; i += lanes_of<V>)
    store_lanes(radius + i, from_torch<V>(to_torch(load_lanes<V>(radius + i)).sqrt()));
  for (int64_t i = 0; i < kPhiloxLanes; ++i) {
    const auto turn = static_cast<int32_t>(v[i]);
    const int32_t quarter = (turn + (1 << 21)) >> 22;
    const float t = static_cast<float>(turn - (quarter << 22)) * 0x1p-22f;  // -1/2..1/2 of it
    const float s = t * t;
    float sine = -0.004601659441119196f;
    sine = sine * s + 0.0796800334531243f;
    sine = sine * s - 0.6459634603196706f;
    sine = ((sine * s + 0.0707963217110894f) * t + 1.5f * t) * radius[i];  // 1.5 t is exact
    float cosine = 0.000903766543869096f;
    cosine = cosine * s - 0.02086016511192402f;
    cosine = cosine * s + 0.2536692259655934f;
    cosine = cosine * s - 1.2337005425976737f;
    cosine = (cosine * s + 1) * radius[i];
    // Odd quarters exchange the two; the cosine is below 0 in quarters 1 and 2, the sine in 2
    // and 3.
    const auto from_sine = std::bit_cast<uint32_t>(sine),
               from_cosine = std::bit_cast<uint32_t>(cosine);
    const auto q = static_cast<uint32_t>(quarter);
    const uint32_t odd = -(q & 1);
    a[i] = std::bit_cast<float>(((from_cosine & ~odd) | (from_sine & odd)) ^ ((q + 1) & 2) << 30);
    b[i] = std::bit_cast<float>(((from_sine & ~odd) | (from_cosine & odd)) ^ (q & 2) << 30);
  }
}

static FASTDIFF_INLINE void box_muller(const uint32_t (&u)[kPhiloxLanes],
                                       const uint32_t (&v)[kPhiloxLanes], double (&a)[kPhiloxLanes],
                                       double (&b)[kPhiloxLanes]) {
  using V = at::vec::Vectorized<double>;  // whose functions are all that is done here
  for (int64_t i = 0; i < kPhiloxLanes; ++i) {
    a[i] = 1 - static_cast<double>(static_cast<int32_t>(u[i])) * 0x1p-24;
    b[i] = static_cast<double>(static_cast<int32_t>(v[i])) * (0x1p-24 * 6.283185307179586);
  }
  for (int64_t i = 0; i < kPhiloxLanes; i += V::size()) {
    const V radius = (V(-2) * V::loadu(a + i).log()).sqrt(), angle = V::loadu(b + i);
    (radius * angle.cos()).store(a + i);
    (radius * angle.sin()).store(b + i);
  }
}

// Words of 32 bits, each in a lane of 64 bits since its products have 64. The upper half of a lane
// is ignored, and need not be zero.
#if defined(CPU_CAPABILITY_AVX512)
typedef uint64_t Words __attribute__((vector_size(64)));
#elif defined(CPU_CAPABILITY_AVX2)
typedef uint64_t Words __attribute__((vector_size(32)));
#else
typedef uint64_t Words __attribute__((vector_size(16)));
#endif

static FASTDIFF_INLINE Words product(Words a, uint32_t factor) {
  const Words b = Words{} + factor;
#if defined(CPU_CAPABILITY_AVX512)  // one instruction, which GCC does not find by itself
  return (Words)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(CPU_CAPABILITY_AVX2)
  return (Words)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return (Words)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
  return (a & 0xFFFFFFFF) * b;
#endif
}

struct PhiloxStream {
  uint32_t key[2];
  uint32_t image, row;

  PhiloxStream(const int64_t* seed, uint32_t row)
      : key{static_cast<uint32_t>(seed[0]), static_cast<uint32_t>(seed[0] >> 32)},
        image(static_cast<uint32_t>(seed[1])),
        row(row) {}

  // words[w][i]: word w of counter `group` + i.
  FASTDIFF_INLINE void words(uint64_t group, uint32_t (&words)[4][kPhiloxLanes]) const {
    constexpr int64_t size = sizeof(Words) / sizeof(uint64_t);
    for (int64_t first = 0; first < kPhiloxLanes; first += 2 * size) {
      Words c[2][4];  // of even counters and of odd ones, so that both fill the lanes in the end
      for (int odd = 0; odd < 2; ++odd) {
        for (int64_t i = 0; i < size; ++i) c[odd][0][i] = group + first + 2 * i + odd;
        c[odd][1] = c[odd][0] >> 32;
        c[odd][2] = Words{} + image;
        c[odd][3] = Words{} + row;
      }
      uint32_t k0 = key[0], k1 = key[1];
      for (int round = 0; round < 10; ++round) {
        for (auto& [c0, c1, c2, c3] : c) {
          const Words a = product(c0, 0xD2511F53), b = product(c2, 0xCD9E8D57);
          c0 = (b >> 32) ^ c1 ^ (Words{} + k0);
          c2 = (a >> 32) ^ c3 ^ (Words{} + k1);
          c1 = b;
          c3 = a;
        }
        k0 += 0x9E3779B9;
        k1 += 0xBB67AE85;
      }
      for (int w = 0; w < 4; ++w) {
        const Words both = (c[0][w] & 0xFFFFFFFF) | (c[1][w] << 32);
        std::memcpy(words[w] + first, &both, sizeof(both));
      }
    }
  }

  // Values 4 group .. 4 group + kPhiloxValues - 1 of the stream.
  template <class Wide>
  FASTDIFF_INLINE void normal(uint64_t group, Wide* out) const {
    uint32_t w[4][kPhiloxLanes];
    words(group, w);
    Wide z[4][kPhiloxLanes];
    for (auto& word : w)
      for (auto& lane : word) lane >>= 8;
    box_muller(w[0], w[1], z[0], z[1]);
    box_muller(w[2], w[3], z[2], z[3]);
    for (int64_t i = 0; i < kPhiloxLanes; ++i)
      for (int word = 0; word < 4; ++word) out[4 * i + word] = z[word][i];
  }

  // Values begin..begin+count-1; returns where the first stands in `buffer`, which has room for
  // count + 2 kPhiloxValues values. Every kPhiloxValues values are made together, so that
  // none depends on `begin`.
  template <class Wide>
  FASTDIFF_INLINE Wide* fill(int64_t begin, int64_t count, Wide* buffer) const {
    const int64_t skipped = begin % kPhiloxValues;
    for (int64_t i = 0; i < skipped + count; i += kPhiloxValues)
      normal(static_cast<uint64_t>(begin - skipped + i) / 4, buffer + i);
    return buffer + skipped;
  }
};

}  // namespace fastdiff::CPU_CAPABILITY
