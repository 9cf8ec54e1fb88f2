#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>

namespace fastdiff {

// Calls body(unit, unit + 1) for each of the units 0..units-1, on whichever of PyTorch's threads is
// free: a core that is slower than the others, or has other work besides, takes fewer units.
template <class Body>
void for_each_unit(int64_t units, const Body& body) {
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(units, at::get_num_threads()), 1, [&](int64_t, int64_t) {
    for (int64_t unit; (unit = next++) < units;) body(unit, unit + 1);
  });
}

}  // namespace fastdiff
