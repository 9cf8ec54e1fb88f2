// Products of bfloat16 matrices with sums in float32, for which this folder is compiled: by tiles
// (AMX), or by dot products of pairs (VDPBF16PS of AVX512-BF16).
//
// C [rows, 32] (+)= A B for groups of 16 rows of A, and a panel of 32 columns of B. A lies in
// planes of 32 columns: 16 neighbouring rows of a plane, 64 bytes each, are one tile. B is packed
// in steps of 2 KiB, in the order in which they are multiplied: [2 halves][16 pairs][16
// columns][2].
//
// A step of tiles, 32 rows by 32 columns by 32 deep, is four loads and four products, which take as
// long if one of A and B comes from L1 and the other from L2. So the caller multiplies few rows of
// A with a long piece of B, or a short piece of B with many rows of A.
#pragma once

#include <c10/util/BFloat16.h>

#include <cstring>

#include "cpu/kernels/vectors.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(FASTDIFF_TILES_EMULATED) || defined(__AMX_BF16__)
#define FASTDIFF_TILES 1
#endif
#ifdef FASTDIFF_TILES_EMULATED
#include "cpu/kernels/bf16/tile_emulation.h"
#endif

namespace fastdiff::CPU_CAPABILITY {

using bf16 = c10::BFloat16;

constexpr int64_t kGroup = 16;           // rows of A that lie evenly
constexpr int64_t kTogetherRows = 32;    // that are multiplied at a time
constexpr int64_t kColumns = 32;         // of a panel of B, and of a plane of A
constexpr int64_t kStepBytes = 2 << 10;  // of B: 32 x 32 values
constexpr int64_t kStepValues = kStepBytes / 2;

// Writes 16 pairs: of each the value of `first`, then that of `second`.
FASTDIFF_INLINE void interleave(const bf16* first, const bf16* second, void* to) {
  using Pairs = uint32_t __attribute__((vector_size(kLanes * 4)));
  for (int64_t i = 0; i < kGroup; i += kLanes) {
    // A bfloat16 is the upper half of a float.
    const auto a = reinterpret_cast<Pairs>(load_lanes(first + i)),
               b = reinterpret_cast<Pairs>(load_lanes(second + i));
    const Pairs both = a >> 16 | b;
    std::memcpy(static_cast<char*>(to) + i * 4, &both, sizeof(both));
  }
}

// How A lies in memory, in bytes: from row to row, from plane to plane, and where in each plane the
// operands of its steps begin, from the address of a group on.
struct Walk {
  int64_t spacing, plane;
  int64_t taps;        // steps of a plane
  const int64_t* tap;  // their offsets
  const int64_t* step =
      nullptr;          // where their parts of B begin, or null if each is behind the last
  int64_t b_plane = 0;  // then from a plane's steps in B to the next plane's
  // Pairs of columns of the last plane, a multiple of 4. A or B is zero in the others, which tiles
  // multiply and dot products leave out.
  int64_t last_pairs = 16;

  FASTDIFF_INLINE const char* b_at(const char* b, int64_t plane, int64_t t) const {
    return step ? b + plane * b_plane + step[t] : b + (plane * taps + t) * kStepBytes;
  }
};

// Walk::last_pairs for rows of that many columns.
constexpr int64_t pairs_of_last_plane(int64_t columns) {
  return ((columns - 1) % kColumns + 8) / 8 * 4;
}

// How the 32 columns of a step of B lie, in bytes: from pair to pair, and from half to half.
struct PackedB {
  static constexpr int64_t kPair = 64, kHalf = 1024;
};
// Pairs whole, side by side, so that a step may begin at any of them.
struct PairsOfB {
  static constexpr int64_t kPair = 128, kHalf = 64;
};

// Up to 32 rows of A: two groups of 16, of which the second may be missing. Tiles read and write
// whole groups, so that the memory behind `rows` must exist, in A and in C.
struct Rows {
  const char *first, *second;  // addresses of their groups
  int64_t count;
};

// Lines of 64 bytes to fetch into L2 while multiplying: `lines` at each step, from `from` on.
struct Fetch {
  const char* from = nullptr;
  int lines = 0;
};

#ifdef FASTDIFF_TILES

// Configures the tiles of the thread that runs, and releases them: PyTorch's threads are oneDNN's
// too, which configures them as it likes, and tiles in use are saved at every switch of threads.
class Tiles {
 public:
  Tiles() {
    struct alignas(64) Config {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int i = 0; i < 8; ++i) config.row_bytes[i] = 64, config.rows[i] = 16;
    // GCC 12 believes that the instruction reads 8 bytes of it.
    asm volatile("" ::"m"(config) : "memory");
    _tile_loadconfig(&config);
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

// After some 650 ns without a 512-bit multiply-add the vector unit sleeps, and what stores the
// tiles then waits 300 ns for it.
FASTDIFF_INLINE void keep_awake() {
#ifdef __AVX512F__
  __m512 zero = _mm512_setzero_ps();
  asm volatile("vfmadd231ps %0, %0, %0" : "+v"(zero));
#endif
}

// As multiply(), of MT groups of rows and NT halves of the panel.
template <class B, int MT, int NT>
FASTDIFF_INLINE void multiply_tiles(const Rows& a, const Walk& walk, int64_t planes, const char* b,
                                    float* c, int64_t ld, bool accumulate, Fetch fetch) {
  asm volatile("" ::: "memory");  // GCC 12's tile loads do not say that they read memory
  const int64_t c_row = ld * 4;
  float* const below = c + kGroup * ld;
  if (accumulate) {
    _tile_loadd(0, c, c_row);
    if constexpr (NT > 1) _tile_loadd(1, c + 16, c_row);
    if constexpr (MT > 1) _tile_loadd(2, below, c_row);
    if constexpr (MT > 1 && NT > 1) _tile_loadd(3, below + 16, c_row);
  } else {
    _tile_zero(0);
    if constexpr (NT > 1) _tile_zero(1);
    if constexpr (MT > 1) _tile_zero(2);
    if constexpr (MT > 1 && NT > 1) _tile_zero(3);
  }
  const int64_t spacing = walk.spacing, taps = walk.taps;
  const char *a0 = a.first, *a1 = a.second;
  for (int64_t plane = 0; plane < planes; ++plane, a0 += walk.plane, a1 += walk.plane)
    for (int64_t t = 0; t < taps; ++t) {
      const char* const now = walk.b_at(b, plane, t);
      // B streams by: it must not displace A in L1.
      _tile_stream_loadd(6, now, B::kPair);
      _tile_loadd(4, a0 + walk.tap[t], spacing);
      if constexpr (NT > 1) _tile_stream_loadd(7, now + B::kHalf, B::kPair);
      if constexpr (MT > 1) _tile_loadd(5, a1 + walk.tap[t], spacing);
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (NT > 1) _tile_dpbf16ps(1, 4, 7);
      if constexpr (MT > 1) _tile_dpbf16ps(2, 5, 6);
      if constexpr (MT > 1 && NT > 1) _tile_dpbf16ps(3, 5, 7);
      for (int i = 0; i < fetch.lines; ++i, fetch.from += 64) __builtin_prefetch(fetch.from, 0, 2);
      keep_awake();
    }
  _tile_stored(0, c, c_row);
  if constexpr (NT > 1) _tile_stored(1, c + 16, c_row);
  if constexpr (MT > 1) _tile_stored(2, below, c_row);
  if constexpr (MT > 1 && NT > 1) _tile_stored(3, below + 16, c_row);
  asm volatile("" ::: "memory");
}

#else

struct Tiles {
  Tiles() {}  // by dot products: there is nothing to configure
};

// M rows and V halves of the panel; the sums stay in registers.
template <class B, int M, int V>
FASTDIFF_INLINE void multiply_band(const char* a, const Walk& walk, int64_t planes, const char* b,
                                   float* c, int64_t ld, bool accumulate, Fetch fetch) {
  F sums[M][V];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) sums[m][v] = F{};
  }
  const int64_t spacing = walk.spacing, taps = walk.taps;
  for (int64_t plane = 0; plane < planes; ++plane, a += walk.plane) {
    const int64_t pairs = plane + 1 < planes ? 16 : walk.last_pairs;
    for (int64_t t = 0; t < taps; ++t) {
      const char* const now = walk.b_at(b, plane, t);
      const char* rows[M];
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) rows[m] = a + walk.tap[t] + m * spacing;
      if (t == 0) {  // the next band, which is nowhere near for the processor to guess
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) __builtin_prefetch(rows[m] + M * spacing);
      }
      for (int64_t four = 0; four < pairs; four += 4) {
#pragma GCC unroll 4
        for (int64_t pair = four; pair < four + 4; ++pair) {
          __m512bh column[V];
#pragma GCC unroll 2
          for (int v = 0; v < V; ++v)
            column[v] = reinterpret_cast<__m512bh>(
                _mm512_loadu_si512(now + v * B::kHalf + pair * B::kPair));
#pragma GCC unroll 8
          for (int m = 0; m < M; ++m) {
            int both;
            __builtin_memcpy(&both, rows[m] + pair * 4, 4);
            const auto row = reinterpret_cast<__m512bh>(_mm512_set1_epi32(both));
#pragma GCC unroll 2
            for (int v = 0; v < V; ++v)
              sums[m][v] = reinterpret_cast<F>(
                  _mm512_dpbf16_ps(reinterpret_cast<__m512>(sums[m][v]), row, column[v]));
          }
        }
      }
      for (int i = 0; i < fetch.lines; ++i, fetch.from += 64) __builtin_prefetch(fetch.from, 0, 2);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      float* to = c + m * ld + v * kLanes;
      store_lanes(to, accumulate ? load_lanes(to) + sums[m][v] : sums[m][v]);
    }
  }
}

template <class B, int V>
inline void multiply_group(const char* a, int64_t count, const Walk& walk, int64_t planes,
                           const char* b, float* c, int64_t ld, bool accumulate, Fetch fetch) {
  constexpr int64_t kBand = 8;
  for (int64_t left = count; left > 0; left -= kBand) {
    const auto band = [&](auto rows) FASTDIFF_HOT {
      multiply_band<B, decltype(rows)::value, V>(a, walk, planes, b, c, ld, accumulate, fetch);
    };
    switch (left) {
      case 1:
        band(std::integral_constant<int, 1>{});
        break;
      case 2:
        band(std::integral_constant<int, 2>{});
        break;
      case 3:
        band(std::integral_constant<int, 3>{});
        break;
      case 4:
        band(std::integral_constant<int, 4>{});
        break;
      case 5:
        band(std::integral_constant<int, 5>{});
        break;
      case 6:
        band(std::integral_constant<int, 6>{});
        break;
      case 7:
        band(std::integral_constant<int, 7>{});
        break;
      default:
        band(std::integral_constant<int, 8>{});
    }
    a += kBand * walk.spacing, c += kBand * ld, fetch.lines = 0;
  }
}

#endif

// C (+)= A B: `a` times the first `columns` columns of a panel of B, at `b`, over `planes` planes
// of A. C's rows lie `ld` floats apart; 16 columns are written, or 32 if `columns` is more.
template <class B = PackedB>
inline void multiply(const Rows& a, const Walk& walk, int64_t planes, const char* b,
                     int64_t columns, float* c, int64_t ld, bool accumulate, Fetch fetch = {}) {
#ifdef FASTDIFF_TILES
  const bool two = a.count > kGroup, wide = columns > 16;
  if (two && wide) return multiply_tiles<B, 2, 2>(a, walk, planes, b, c, ld, accumulate, fetch);
  if (two) return multiply_tiles<B, 2, 1>(a, walk, planes, b, c, ld, accumulate, fetch);
  if (wide) return multiply_tiles<B, 1, 2>(a, walk, planes, b, c, ld, accumulate, fetch);
  multiply_tiles<B, 1, 1>(a, walk, planes, b, c, ld, accumulate, fetch);
#else
  const auto groups = [&](auto halves) {
    constexpr int V = decltype(halves)::value;
    multiply_group<B, V>(a.first, std::min(a.count, kGroup), walk, planes, b, c, ld, accumulate,
                         fetch);
    if (a.count > kGroup)
      multiply_group<B, V>(a.second, a.count - kGroup, walk, planes, b, c + kGroup * ld, ld,
                           accumulate, {});
  };
  if (columns > 16) return groups(std::integral_constant<int, 2>{});
  groups(std::integral_constant<int, 1>{});
#endif
}

}  // namespace fastdiff::CPU_CAPABILITY
