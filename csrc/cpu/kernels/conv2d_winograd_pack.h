// The weight of conv2d_winograd.h: G g G^T of each filter and channel, in float64.
//
// For each phase panels of [planes, C, filters], each plane padded with zeros. Planes are multiples
// of a page apart, where their lines would push each other out of the cache: so the rows of all
// planes are computed into a buffer, and written in whole lines.
#pragma once

#include <cstring>

#include "cpu/kernels/conv2d_pack.h"
#include "cpu/kernels/conv2d_phases.h"
#include "cpu/kernels/conv2d_winograd.h"

namespace fastdiff::CPU_CAPABILITY {

// A register of float64, and as many float32.
using D = double __attribute__((vector_size(kLanes * 4)));
using HalfF = float __attribute__((vector_size(kLanes * 2)));

// G g G^T of a register of filters: element (a, q) goes to out[(a * kTile + q) * ld].
template <int m, int r>
FASTDIFF_INLINE void transform_weight(const D (&g)[r][r], float* out, int64_t ld) {
  constexpr int kTile = m + r - 1;
  const auto& G = Filtering<m, r>::kWeight;
  D half[kTile][r];
#pragma GCC unroll 6
  for (int a = 0; a < kTile; ++a)
#pragma GCC unroll 3
    for (int s = 0; s < r; ++s) {
      half[a][s] = G[a][0] * g[0][s];
#pragma GCC unroll 2
      for (int i = 1; i < r; ++i) half[a][s] += G[a][i] * g[i][s];
    }
#pragma GCC unroll 6
  for (int a = 0; a < kTile; ++a)
#pragma GCC unroll 6
    for (int q = 0; q < kTile; ++q) {
      D u = G[q][0] * half[a][0];
#pragma GCC unroll 2
      for (int i = 1; i < r; ++i) u += G[q][i] * half[a][i];
      const HalfF rounded = __builtin_convertvector(u, HalfF);
      std::memcpy(out + (a * kTile + q) * ld, &rounded, sizeof(rounded));
    }
}

template <int m, int r, class Products>
void winograd_pack(const ConvWeight& size, const WeightValues& weight, void* packed, int64_t* count,
                   const Threads& threads) {
  using Element = typename Products::Element;
  constexpr int kTile = m + r - 1, kPlanes = kTile * kTile, kPhases = r == 2 ? 4 : 1;
  constexpr int64_t kPanel = Products::kPanel, kRows = Products::kRows, kHalf = kLanes / 2;
  const int64_t channels = size.channels, depth = rounded_up(channels, Products::kDepth),
                phase_size = packed_count<m, r, Products>(size);
  auto* out = static_cast<Element*>(packed);
  *count = kPhases * phase_size;
  if (!out) return;
  pack_parts(threads, size.filters, kPanel, depth,
             [&](int64_t first, int64_t filters, int64_t begin, int64_t end) {
               const int64_t columns = Products::width(filters);
               WeightBlock<kPanel> block;
               block.read(weight, first, filters, begin, std::min(end, channels), 0, 9);
               alignas(64) float rows[kRows][kPlanes][kPanel];
               for (int64_t c = begin; c < end; c += kRows) {
                 for (int64_t phase = 0; phase < kPhases; ++phase) {
                   for (int64_t i = 0; i < kRows; ++i)
                     for (int64_t k = 0; k < columns; k += kHalf) {
                       D whole[9], of_phase[r][r];
                       for (int tap = 0; tap < 9; ++tap) {
                         HalfF value;
                         std::memcpy(&value, block.rows[tap][c + i - begin] + k, sizeof(value));
                         whole[tap] = __builtin_convertvector(value, D);
                       }
                       phase_taps<r>(whole, phase, of_phase);
                       transform_weight<m, r>(of_phase, rows[i][0] + k, kPanel);
                     }
                   Element* plane = out + phase * phase_size + first * kPlanes * depth;
                   for (int a = 0; a < kPlanes; ++a, plane += depth * columns)
                     Products::pack(rows[0][a], kPlanes * kPanel, columns, c, plane);
                 }
               }
             });
}

}  // namespace fastdiff::CPU_CAPABILITY
