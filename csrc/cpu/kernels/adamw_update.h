#pragma once

#include <c10/core/ScalarType.h>

#include <cstdint>

#include "cpu/isa.h"

namespace fastdiff {

// The numbers of a step that all tensors share. Let lr be the learning rate and k the step's
// number, counted from 1.
struct AdamwUpdate {
  c10::ScalarType dtype;   // float32 or float64, of all tensors
  double gradient_factor;  // the gradient is multiplied by it first
  double decay;            // 1 - lr weight_decay
  double beta1, beta2;
  double step_size;  // lr / (1 - beta1^k)
  double root;       // sqrt(1 - beta2^k)
  double eps;
  double average_weight;
};

// A parameter and what belongs to it, dense and of one layout.
struct AdamwTensors {
  void* parameter;
  const void* gradient;
  void* exp_avg;
  void* exp_avg_sq;
  void* average;  // or null
};

// Updates elements begin..end-1.
FASTDIFF_DECLARE(adamw_update, const AdamwUpdate&, const AdamwTensors&, int64_t begin, int64_t end)

// Adds the squares of elements begin..end-1 of x to `sum`.
FASTDIFF_DECLARE(add_squares, c10::ScalarType dtype, const void* x, int64_t begin, int64_t end,
                 double& sum)

}  // namespace fastdiff
