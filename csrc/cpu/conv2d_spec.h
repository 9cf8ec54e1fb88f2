// A convolution's numbers as Python passes them.
#pragma once

#include <ATen/core/Tensor.h>

#include "cpu/kernels/conv2d.h"

namespace fastdiff {

// A weight of sizes [K, C, R, S]. ValueError where no kernel takes it.
ConvWeight decode_weight(at::IntArrayRef sizes);

// What ConvSpec.encode of fastdiff/ops/conv2d_spec.py encodes. ValueError for anything that no
// kernel takes: another number of numbers, sizes and distances below the least that makes sense or
// so large that what is computed from them might overflow, and flags other than 0 and 1.
ConvSpec decode_spec(at::IntArrayRef numbers);

}  // namespace fastdiff
