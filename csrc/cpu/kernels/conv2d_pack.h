// How weights are read while they are packed. All packed forms are panels of rows of filters. But
// in a weight the values of a row mostly lie a whole filter apart, each in a cache line and a page
// of its own. So a few channels of all filters of a panel are packed at a time. They are read into
// a block of rows first, 16 by 16 values at a time where channels or taps are neighbours in memory.
#pragma once

#include <cstring>

#include "cpu/kernels/conv2d_grid.h"
#include "cpu/kernels/gemm.h"

namespace fastdiff::CPU_CAPABILITY {

constexpr int64_t kPackedChannels = 16;  // a cache line of each filter of a 1x1 weight
constexpr int64_t kPackedTaps = 9;       // that a block has at most

// A part of a weight as rows of kColumns filters. What a last part has not is zero.
template <int64_t kColumns>
struct WeightBlock {
  alignas(64) float rows[kPackedTaps][kPackedChannels][kColumns];

  // Reads `filters` filters from `first` on, channels begin..end-1 and `taps` taps from `tap` on.
  void read(const WeightValues& weight, int64_t first, int64_t filters, int64_t begin, int64_t end,
            int64_t tap, int64_t taps) {
    constexpr int64_t kTap = kPackedChannels * kColumns;
    const int64_t channels = std::max<int64_t>(0, end - begin);
    if (filters < kColumns || channels < kPackedChannels)
      std::memset(rows, 0, taps * sizeof(rows[0]));
    const float* from =
        weight.data + first * weight.filter + begin * weight.channel + tap * weight.tap;
    const auto transpose = [&](const float* matrix, int64_t columns, float* to, int64_t ld) {
      at::vec::transpose_mxn<float>(matrix, weight.filter, to, ld, static_cast<int>(filters),
                                    static_cast<int>(columns));
    };
    if (weight.channel == 1 && weight.filter != 1) {
      for (int64_t t = 0; t < taps; ++t)
        transpose(from + t * weight.tap, channels, rows[t][0], kColumns);
    } else if (weight.tap == 1 && weight.filter != 1) {
      for (int64_t c = 0; c < channels; ++c)
        transpose(from + c * weight.channel, taps, rows[0][c], kTap);
    } else if (weight.tap == -1 && weight.filter != 1) {  // the last tap is the first in memory
      for (int64_t c = 0; c < channels; ++c)
        transpose(from + c * weight.channel - (taps - 1), taps, rows[taps - 1][c], -kTap);
    } else {
      for (int64_t t = 0; t < taps; ++t)
        for (int64_t c = 0; c < channels; ++c) {
          const float* row = from + t * weight.tap + c * weight.channel;
          if (weight.filter == 1) {
            std::memcpy(rows[t][c], row, filters * sizeof(float));
          } else {
            for (int64_t k = 0; k < filters; ++k) rows[t][c][k] = row[k * weight.filter];
          }
        }
    }
  }
};

// Calls body(first filter, filters, first channel, end) for each part of a weight: `panel` filters
// or those that are left, and kPackedChannels of `channels`. The threads share the parts.
template <class Body>
void pack_parts(const Threads& threads, int64_t filters, int64_t panel, int64_t channels,
                Body&& body) {
  const int64_t panels = (filters + panel - 1) / panel,
                blocks = (channels + kPackedChannels - 1) / kPackedChannels;
  share(threads, panels * blocks, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      const int64_t first = part / blocks * panel, c = part % blocks * kPackedChannels;
      body(first, std::min(panel, filters - first), c, std::min(c + kPackedChannels, channels));
    }
  });
}

}  // namespace fastdiff::CPU_CAPABILITY
