// Checks and layout helpers that the CPU operations share.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <utility>

namespace fastdiff {

// Elements that are worth a thread of their own where an element costs a few instructions: waking
// one takes as long as 8 microseconds of that.
constexpr int64_t kGrain = 65536;
constexpr int64_t kHeavyGrain = 8192;  // likewise, where it costs a nanosecond or more

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

// Tells autograd that `value` was written to, as PyTorch's own operations do.
inline void bump_version(const at::Tensor& value) {
  if (!value.is_inference()) value.unsafeGetTensorImpl()->bump_version();
}

// Whether a write to `a` might be seen in `b`: whether their stretches of memory meet.
inline bool overlap(const at::Tensor& a, const at::Tensor& b) {
  const auto stretch = [](const at::Tensor& t) {
    int64_t last = t.itemsize();
    for (int64_t d = 0; d < t.dim(); ++d) last += (t.size(d) - 1) * t.stride(d) * t.itemsize();
    const auto* first = static_cast<const char*>(t.const_data_ptr());
    return std::pair(first, first + last);
  };
  if (a.numel() == 0 || b.numel() == 0) return false;
  const auto [a_first, a_last] = stretch(a);
  const auto [b_first, b_last] = stretch(b);
  return a_first < b_last && b_first < a_last;
}

}  // namespace fastdiff
