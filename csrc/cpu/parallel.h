#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>

namespace fastdiff {

// body(begin, end) for ranges of `grain` units that together are 0..units-1, by whichever of
// PyTorch's threads is free: a core that is slower than the others, or has other work besides,
// takes fewer of them.
template <class Body>
void for_ranges(int64_t units, int64_t grain, const Body& body) {
  std::atomic<int64_t> next{0};
  const int64_t ranges = (units + grain - 1) / grain;
  at::parallel_for(0, std::min<int64_t>(ranges, at::get_num_threads()), 1, [&](int64_t, int64_t) {
    for (int64_t begin; (begin = next.fetch_add(grain)) < units;)
      body(begin, std::min(units, begin + grain));
  });
}

}  // namespace fastdiff
