#pragma once

#include <ATen/core/Tensor.h>

namespace fastdiff {

// Fills out [N, ...], contiguous, with the noise of seed [N, 2]; both have been checked.
void fill_philox_normal(const at::Tensor& seed, uint32_t row, const at::Tensor& out);

void check_seed(const at::Tensor& seed, const at::Tensor& x);

// The number in a row given as a tensor, after a check: its lowest 32 bits.
uint32_t row_number(const at::Tensor& row);

}  // namespace fastdiff
