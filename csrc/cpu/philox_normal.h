#pragma once

#include <ATen/core/Tensor.h>

namespace fastdiff {

// Fills a contiguous `out` [N, ...] with the noise of `seed` [N, 2]. The caller has checked both.
void fill_philox_normal(const at::Tensor& seed, uint32_t row, const at::Tensor& out);

void check_seed(const at::Tensor& seed, const at::Tensor& x);

// The lowest 32 bits of `row`, after a check that it is an int64 tensor of one element.
uint32_t row_number(const at::Tensor& row);

}  // namespace fastdiff
