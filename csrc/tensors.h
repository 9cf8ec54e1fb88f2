// Checks and layout helpers that the operations of every device share.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <c10/util/Exception.h>

#include <utility>

namespace fastdiff {

inline void check_device(const at::Tensor& value, c10::Device device, const char* name) {
  TORCH_CHECK_VALUE(value.device() == device, name, " must be on ", device, ", got ",
                    value.device());
}

inline void check_tensor(const at::Tensor& value, at::IntArrayRef sizes, at::ScalarType type,
                         c10::Device device, const char* name) {
  TORCH_CHECK_VALUE(value.sizes() == sizes, name, " must have shape ", sizes, ", got ",
                    value.sizes());
  TORCH_CHECK_TYPE(value.scalar_type() == type, name, " must be ", type, ", got ",
                   value.scalar_type());
  check_device(value, device, name);
}

inline void check_like(const at::Tensor& value, const at::Tensor& x, const char* name) {
  check_tensor(value, x.sizes(), x.scalar_type(), x.device(), name);
}

// The layout of an operation's result: channels-last for a tensor that is unambiguously so, else
// channels-first.
inline at::MemoryFormat layout_of(const at::Tensor& x) { return x.suggest_memory_format(); }

inline at::Tensor empty_like(const at::Tensor& x, at::MemoryFormat format) {
  return at::empty_like(x, x.options().memory_format(format));
}

// Tells autograd that `value` was written to, as PyTorch's own operations do.
inline void bump_version(const at::Tensor& value) {
  if (!value.is_inference()) value.unsafeGetTensorImpl()->bump_version();
}

// Whether a write to `a` might be seen in `b`: whether their ranges of addresses meet.
inline bool overlap(const at::Tensor& a, const at::Tensor& b) {
  const auto range = [](const at::Tensor& t) {
    int64_t last = t.itemsize();
    for (int64_t d = 0; d < t.dim(); ++d) last += (t.size(d) - 1) * t.stride(d) * t.itemsize();
    const auto* first = static_cast<const char*>(t.const_data_ptr());
    return std::pair(first, first + last);
  };
  if (a.numel() == 0 || b.numel() == 0) return false;
  const auto [a_first, a_last] = range(a);
  const auto [b_first, b_last] = range(b);
  return a_first < b_last && b_first < a_last;
}

// Whether each slot of `history` [K, *x.shape] lies in memory as the dense tensor `x` does.
inline bool slots_like(const at::Tensor& history, const at::Tensor& x) {
  for (int64_t d = 0; d < x.dim(); ++d)
    if (x.size(d) > 1 && history.stride(d + 1) != x.stride(d)) return false;
  return true;
}

}  // namespace fastdiff
