// Intel's tile instructions in portable C++, under the names of the intrinsics, so that the kernels
// that use them are tested on every machine. Each thread has its own tiles, as each core has.
//
// As the hardware multiplies (Intel 64 and IA-32 Architectures Software Developer's Manual,
// TDPBF16PS): for each element of C the even products of all pairs are summed in one chain and the
// odd ones in another, each by fused multiply-adds that begin with zero; the two sums are added,
// and their sum is added to C. It rounds to nearest even, and takes denormals for zero, in operands
// and in results.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace fastdiff::CPU_CAPABILITY::tile_emulation {

struct Tile {
  alignas(64) uint8_t row[16][64];
};

struct State {
  bool configured = false;
  uint16_t row_bytes[8];
  uint8_t rows[8];
  Tile tiles[8];
};

inline State& state() {
  static thread_local State s;
  return s;
}

// What the processor would answer by a signal: a kernel that does it is wrong on every machine.
inline void require(bool ok, const char* what) {
  if (ok) return;
  std::fprintf(stderr, "fastdiff: emulated tiles: %s\n", what);
  std::abort();
}

inline Tile& tile(int i) {
  require(state().configured, "this thread's tiles are not configured");
  return state().tiles[i];
}

inline void load_config(const void* config) {
  const auto* bytes = static_cast<const uint8_t*>(config);
  State& s = state();
  require(bytes[0] == 1, "the palette is not 1");
  for (int i = 0; i < 8; ++i) {
    std::memcpy(&s.row_bytes[i], bytes + 16 + 2 * i, 2);
    s.rows[i] = bytes[48 + i];
    require(s.row_bytes[i] <= 64 && s.rows[i] <= 16, "a tile is larger than 16 rows of 64 bytes");
  }
  s.configured = true;
  std::memset(s.tiles, 0, sizeof s.tiles);
}

inline void release() { state().configured = false; }

inline void zero(int t) { std::memset(&tile(t), 0, sizeof(Tile)); }

inline void load(int t, const void* base, int64_t stride) {
  Tile& to = tile(t);
  const State& s = state();
  std::memset(&to, 0, sizeof to);
  for (int i = 0; i < s.rows[t]; ++i)
    std::memcpy(to.row[i], static_cast<const char*>(base) + i * stride, s.row_bytes[t]);
}

inline void store(int t, void* base, int64_t stride) {
  const Tile& from = tile(t);
  const State& s = state();
  for (int i = 0; i < s.rows[t]; ++i)
    std::memcpy(static_cast<char*>(base) + i * stride, from.row[i], s.row_bytes[t]);
}

inline float flushed(float x) {
  return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.f, x) : x;
}

inline float widened(const uint8_t* bf16) {
  uint16_t half;
  std::memcpy(&half, bf16, 2);
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return flushed(x);
}

// c += a b.
inline void multiply(int c, int a, int b) {
  Tile &to = tile(c), &x = tile(a), &y = tile(b);
  const State& s = state();
  require(c != a && a != b && c != b, "a product names a tile twice");
  require(
      s.rows[c] == s.rows[a] && s.row_bytes[c] == s.row_bytes[b] && s.rows[b] * 4 == s.row_bytes[a],
      "the shapes of a product's tiles do not fit");
  const int columns = s.row_bytes[c] / 4, depth = s.row_bytes[a] / 4;
  float wide[16][32];  // y's pairs
  for (int k = 0; k < depth; ++k)
    for (int n = 0; n < 2 * columns; ++n) wide[k][n] = widened(y.row[k] + 2 * n);
  for (int m = 0; m < s.rows[c]; ++m) {
    float even[16] = {}, odd[16] = {};
    for (int k = 0; k < depth; ++k) {
      const float x0 = widened(x.row[m] + 4 * k), x1 = widened(x.row[m] + 4 * k + 2);
      for (int n = 0; n < columns; ++n) {
        even[n] = flushed(std::fma(x0, wide[k][2 * n], even[n]));
        odd[n] = flushed(std::fma(x1, wide[k][2 * n + 1], odd[n]));
      }
    }
    for (int n = 0; n < columns; ++n) {
      float sum;
      std::memcpy(&sum, to.row[m] + 4 * n, 4);
      sum = flushed(flushed(sum) + flushed(even[n] + odd[n]));
      std::memcpy(to.row[m] + 4 * n, &sum, 4);
    }
  }
}

}  // namespace fastdiff::CPU_CAPABILITY::tile_emulation

// <immintrin.h> has macros of these names.
#undef _tile_loadd
#undef _tile_stream_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_loadconfig(config) tile_emulation::load_config(config)
#define _tile_release() tile_emulation::release()
#define _tile_zero(t) tile_emulation::zero(t)
#define _tile_loadd(t, base, stride) tile_emulation::load(t, base, stride)
#define _tile_stream_loadd(t, base, stride) tile_emulation::load(t, base, stride)
#define _tile_stored(t, base, stride) tile_emulation::store(t, base, stride)
#define _tile_dpbf16ps(c, a, b) tile_emulation::multiply(c, a, b)
