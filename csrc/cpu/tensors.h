// Checks and layout helpers that the CPU operations share.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <c10/util/Exception.h>

#include <algorithm>

namespace fastdiff {

// Elements that are worth a thread of their own where an element costs a few instructions: waking
// one takes as long as 8 microseconds of that.
constexpr int64_t kGrain = 65536;

inline void check_floating(const at::Tensor& x, const char* name) {
  const auto type = x.scalar_type();
  TORCH_CHECK_TYPE(
      type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf, name,
      " must be float32, float64, bfloat16 or float16, got ", type);
  TORCH_CHECK_VALUE(x.device().is_cpu(), name, " must be on the CPU, got ", x.device());
}

inline void check_tensor(const at::Tensor& value, at::IntArrayRef sizes, at::ScalarType type,
                         const char* name) {
  TORCH_CHECK_VALUE(value.sizes() == sizes, name, " must have shape ", sizes, ", got ",
                    value.sizes());
  TORCH_CHECK_TYPE(value.scalar_type() == type, name, " must be ", type, ", got ",
                   value.scalar_type());
  TORCH_CHECK_VALUE(value.device().is_cpu(), name, " must be on the CPU, got ", value.device());
}

inline void check_like(const at::Tensor& value, const at::Tensor& x, const char* name) {
  check_tensor(value, x.sizes(), x.scalar_type(), name);
}

// The type that statistics and coefficients of `type` tensors are kept in.
inline at::ScalarType wide_type(at::ScalarType type) {
  return type == at::kDouble ? at::kDouble : at::kFloat;
}

// Channels-last is kept for tensors that have it and only it; everything else is channels-first.
inline at::MemoryFormat layout_of(const at::Tensor& x) { return x.suggest_memory_format(); }

inline at::Tensor empty_like(const at::Tensor& x, at::MemoryFormat format) {
  return at::empty_like(x, x.options().memory_format(format));
}

}  // namespace fastdiff
