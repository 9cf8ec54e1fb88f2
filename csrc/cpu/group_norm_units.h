// How the operations around group_norm_silu divide their work among threads.
#pragma once

#include <algorithm>

#include "cpu/kernels/group_norm_silu.h"
#include "cpu/tensors.h"

namespace fastdiff {

// Groups in a unit. Channels-first a group is contiguous and a unit of its own. Channels-last whole
// pixels are read and written fastest (measured: units of 256 bytes of each cost up to 2x), even if
// an image is read from a slower cache the second time. So a pixel is divided among units only
// where there are fewer images than threads, and then a unit has at least a few cache lines of it.
inline int64_t groups_in_unit(const GroupNormSilu& args, int64_t images) {
  if (!args.channels_last) return 1;
  constexpr int64_t kLines = 4 * 64;  // bytes
  const auto bytes = static_cast<int64_t>(c10::elementSize(args.dtype));
  const int64_t per_group = args.channels / args.groups * bytes;
  const int64_t share = args.groups * images / at::get_num_threads();
  return std::clamp<int64_t>(std::max(share, kLines / per_group), 1, args.groups);
}

// Runs kernel(begin, end) over all units of that many images.
template <class Kernel>
void for_units(const GroupNormSilu& args, int64_t images, Kernel&& kernel) {
  constexpr int64_t kElements = kGrain / 4;  // of a thread at least; each takes an exponential
  const int64_t units = (args.groups + args.unit_groups - 1) / args.unit_groups;
  const int64_t width = args.unit_groups * (args.channels / args.groups);
  at::parallel_for(0, images * units, std::max<int64_t>(1, kElements / (width * args.pixels)),
                   kernel);
}

}  // namespace fastdiff
