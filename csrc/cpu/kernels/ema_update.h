#pragma once

#include <c10/core/ScalarType.h>

#include <cstdint>

#include "cpu/isa.h"

namespace fastdiff {

// An average and its parameter, dense and of one layout.
struct EmaTensors {
  c10::ScalarType average_dtype, parameter_dtype;
  void* average;
  const void* parameter;
};

// Updates elements begin..end-1.
FASTDIFF_DECLARE(ema_update, const EmaTensors&, double weight, int64_t begin, int64_t end)

}  // namespace fastdiff
