// Philox4x32-10 (Salmon et al. 2011) and normal noise made of it (Box and Muller 1958).
//
// A counter (group, image, row) under a key of two words gives four words, so four normal values:
// elements 4 group .. 4 group + 3 of an image, counted in its contiguous order [C, pixels] whatever
// the memory layout. The words are bitwise those of the reference and of the CPU. The normal values
// come from the same polynomials in the same order. They differ by at most 2 units in the last
// place, where one compiler contracts a product and a sum and the other does not.
#pragma once

#include <cstdint>

#include "cuda/device.cuh"

namespace fastdiff::cuda {

// a = sqrt(-2 ln(1 - u)) cos(2 pi v) and b = sqrt(-2 ln(1 - u)) sin(2 pi v), of u and v in units of
// 2^-24.
//
// The arguments of the polynomials are exact in float32: 1 - u, and the distance of v from the
// nearest quarter turn. The polynomials are minimax in the relative error, which is below 3.2e-8
// for the logarithm between sqrt(1/2) and sqrt(2), and below 3.3e-9 for the sine and the cosine up
// to an eighth of a turn. They are cheaper than the library's functions, which reduce any argument.
__device__ __forceinline__ void box_muller(uint32_t u, uint32_t v, float& a, float& b) {
  const auto x = static_cast<float>(static_cast<int32_t>((1u << 24) - u));  // 2^24 (1 - u)
  const int32_t bits = __float_as_int(x);
  const int32_t exponent = (bits - 0x3F3504F3) >> 23;  // x = 2^exponent (1 + f)
  const float f = __int_as_float(bits - exponent * (1 << 23)) - 1;
  float p = 0.08700435608625412f;
  p = p * f - 0.14267486333847046f;
  p = p * f + 0.14914767444133759f;
  p = p * f - 0.1657758504152298f;
  p = p * f + 0.19963063299655914f;
  p = p * f - 0.2500133812427521f;
  p = p * f + 0.3333390951156616f;
  p = f * f * (f * p - 0.5f) + f;
  const float radius =
      __fsqrt_rn(-2 * (static_cast<float>(exponent - 24) * 0.6931471805599453f + p));

  const auto turn = static_cast<int32_t>(v);
  const int32_t quarter = (turn + (1 << 21)) >> 22;
  // The distance from the quarter turn, -1/2..1/2 of a quarter.
  const float t = static_cast<float>(turn - quarter * (1 << 22)) * 0x1p-22f;
  const float s = t * t;
  float sine = -0.004601659441119196f;
  sine = sine * s + 0.0796800334531243f;
  sine = sine * s - 0.6459634603196706f;
  sine = ((sine * s + 0.0707963217110894f) * t + 1.5f * t) * radius;  // 1.5 t is exact
  float cosine = 0.000903766543869096f;
  cosine = cosine * s - 0.02086016511192402f;
  cosine = cosine * s + 0.2536692259655934f;
  cosine = cosine * s - 1.2337005425976737f;
  cosine = (cosine * s + 1) * radius;

  // Odd quarters exchange sine and cosine. The cosine is negative in quarters 1 and 2, the sine in
  // 2 and 3.
  const auto q = static_cast<uint32_t>(quarter);
  const float first = q & 1 ? sine : cosine, second = q & 1 ? cosine : sine;
  a = __uint_as_float(__float_as_uint(first) ^ ((q + 1) & 2) << 30);
  b = __uint_as_float(__float_as_uint(second) ^ (q & 2) << 30);
}

// The stream of an image at a row: what its noise depends on besides the element.
struct PhiloxStream {
  uint32_t key0, key1, image, row;

  // `seed` points to two numbers: the image's seed and the image's number.
  __device__ __forceinline__ PhiloxStream(const int64_t* seed, uint32_t row) : row(row) {
    const auto key = static_cast<uint64_t>(load_one(seed));
    key0 = static_cast<uint32_t>(key);
    key1 = static_cast<uint32_t>(key >> 32);
    image = static_cast<uint32_t>(load_one(seed + 1));
  }

  __device__ __forceinline__ void words(uint64_t group, uint32_t (&w)[4]) const {
    uint32_t c0 = static_cast<uint32_t>(group), c1 = static_cast<uint32_t>(group >> 32);
    uint32_t c2 = image, c3 = row, k0 = key0, k1 = key1;
#pragma unroll
    for (int round = 0; round < 10; ++round) {
      const uint64_t first = static_cast<uint64_t>(c0) * 0xD2511F53u;
      const uint64_t second = static_cast<uint64_t>(c2) * 0xCD9E8D57u;
      c0 = static_cast<uint32_t>(second >> 32) ^ c1 ^ k0;
      c1 = static_cast<uint32_t>(second);
      c2 = static_cast<uint32_t>(first >> 32) ^ c3 ^ k1;
      c3 = static_cast<uint32_t>(first);
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    w[0] = c0;
    w[1] = c1;
    w[2] = c2;
    w[3] = c3;
  }

  // The normal values of the elements 4 group .. 4 group + 3.
  __device__ __forceinline__ void normal(uint64_t group, float (&z)[4]) const {
    uint32_t w[4];
    words(group, w);
    box_muller(w[0] >> 8, w[1] >> 8, z[0], z[1]);
    box_muller(w[2] >> 8, w[3] >> 8, z[2], z[3]);
  }

  // The normal value of one element. It costs four times as much per element as `normal`, and is
  // for layouts and edges where a thread does not hold four consecutive elements.
  __device__ __forceinline__ float normal_at(uint64_t element) const {
    uint32_t w[4];
    words(element >> 2, w);
    const bool high = element & 2;
    float a, b;
    box_muller((high ? w[2] : w[0]) >> 8, (high ? w[3] : w[1]) >> 8, a, b);
    return element & 1 ? b : a;
  }
};

}  // namespace fastdiff::cuda
