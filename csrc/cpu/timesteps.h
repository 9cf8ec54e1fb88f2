#pragma once

#include "cpu/tensors.h"

namespace fastdiff {

// Returns t [N] contiguous, after a check that each timestep is an index into a table of `steps`
// entries.
inline at::Tensor checked_timesteps(const at::Tensor& t, int64_t images, int64_t steps) {
  check_tensor(t, {images}, at::kLong, "t");
  const auto dense = t.contiguous();
  if (images == 0) return dense;
  const int64_t* value = dense.const_data_ptr<int64_t>();
  const auto [low, high] = std::minmax_element(value, value + images);
  TORCH_CHECK_INDEX(*low >= 0 && *high < steps, "t must lie in 0..", steps - 1,
                    " (the schedule's steps), got values from ", *low, " to ", *high);
  return dense;
}

}  // namespace fastdiff
