// How weights are read while they are packed. A weight is [K, C, window], and all packed forms are
// panels of rows of filters. A row's values are a whole filter apart, so that each comes from a
// cache line, and mostly a page, of its own. So a few channels of all filters of a panel are packed
// at a time: their lines stay in the cache until every row has been written that reads them.
#pragma once

#include "cpu/kernels/conv2d_grid.h"
#include "cpu/kernels/gemm.h"

namespace fastdiff::CPU_CAPABILITY {

constexpr int64_t kPackedChannels = 16;  // a cache line of each filter of a 1x1 weight

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
