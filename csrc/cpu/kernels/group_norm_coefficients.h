#pragma once

#include <c10/core/ScalarType.h>

#include <cstdint>

#include "cpu/isa.h"

namespace fastdiff {

constexpr int64_t kStatisticsChannels = 64;  // of a unit of work

// Mean and variance over the pixels of each channel of x [N, P, C]. A unit of work is
// kStatisticsChannels neighbouring channels of an image, or those that are left.
struct ChannelStatistics {
  c10::ScalarType dtype;
  int64_t channels, pixels;
  const void* x;
  double* out;  // [N, C, 2]
};

FASTDIFF_DECLARE(channel_statistics, const ChannelStatistics&, int64_t begin, int64_t end)

}  // namespace fastdiff
