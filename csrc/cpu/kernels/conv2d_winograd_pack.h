// The weight of conv2d_winograd.h: G g G^T of each filter and channel, in float64.
//
// For each phase panels of [planes, C, filters], each plane's rows padded with zeros to whole
// vectors of channels. Planes are multiples of a page apart, where their lines would push each
// other out of the cache: so the rows of all planes are computed into a buffer, and written whole.
#pragma once

#include <cstring>

#include "cpu/kernels/conv2d_pack.h"
#include "cpu/kernels/conv2d_phases.h"
#include "cpu/kernels/conv2d_winograd.h"

namespace fastdiff::CPU_CAPABILITY {

// A register of float64, and as many float32.
using D = double __attribute__((vector_size(kLanes * 4)));
using HalfF = float __attribute__((vector_size(kLanes * 2)));

// G g G^T of a register of filters: element (a, q) goes to out[(a * kTile + q) * kPanel].
template <int m, int r>
FASTDIFF_INLINE void transform_weight(const D (&g)[r][r], float* out) {
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
      std::memcpy(out + (a * kTile + q) * kPanel, &rounded, sizeof(rounded));
    }
}

template <int m, int r>
void winograd_pack(const ConvWeight& size, const float* weight, void* packed, int64_t* count,
                   const Threads& threads) {
  constexpr int kTile = m + r - 1, kPlanes = kTile * kTile, kPhases = r == 2 ? 4 : 1;
  constexpr int64_t kHalf = kLanes / 2;
  const int64_t channels = size.channels, depth = rounded_up(channels, kLanes),
                phase_size = kPlanes * depth * packed_columns(size.filters);
  auto* out = static_cast<float*>(packed);
  *count = kPhases * phase_size;
  if (!out) return;
  pack_parts(threads, size.filters, kPanel, depth,
             [&](int64_t first, int64_t filters, int64_t begin, int64_t end) {
               const int64_t columns = packed_columns(filters);
               alignas(64) float g[9][kPanel] = {}, rows[kPlanes][kPanel];
               for (int64_t c = begin; c < end; ++c) {
                 for (int64_t k = 0; k < filters; ++k)
                   for (int64_t tap = 0; tap < 9; ++tap)
                     g[tap][k] = c < channels ? weight[((first + k) * channels + c) * 9 + tap] : 0;
                 for (int64_t phase = 0; phase < kPhases; ++phase) {
                   for (int64_t k = 0; k < columns; k += kHalf) {
                     D whole[9], of_phase[r][r];
                     for (int tap = 0; tap < 9; ++tap) {
                       HalfF value;
                       std::memcpy(&value, g[tap] + k, sizeof(value));
                       whole[tap] = __builtin_convertvector(value, D);
                     }
                     phase_taps<r>(whole, phase, of_phase);
                     transform_weight<m, r>(of_phase, rows[0] + k);
                   }
                   float* row = out + phase * phase_size + first * kPlanes * depth + c * columns;
                   for (int plane = 0; plane < kPlanes; ++plane, row += depth * columns)
                     std::memcpy(row, rows[plane], columns * sizeof(float));
                 }
               }
             });
}

}  // namespace fastdiff::CPU_CAPABILITY
