// What the CPU operations share beyond tensors.h.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>

#include "../tensors.h"

namespace fastdiff {

// A thread gets at least kGrain elements where an element costs a few instructions, and at least
// kHeavyGrain where it costs a nanosecond or more: either takes about 8 microseconds, as long as it
// takes to wake a thread.
constexpr int64_t kGrain = 65536;
constexpr int64_t kHeavyGrain = 8192;

inline void check_floating(const at::Tensor& x, const char* name) {
  const auto type = x.scalar_type();
  TORCH_CHECK_TYPE(
      type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf, name,
      " must be float32, float64, bfloat16 or float16, got ", type);
  check_device(x, at::kCPU, name);
}

// The types of the operations that only the compiler calls.
inline void check_float_or_bfloat16(const at::Tensor& x, const char* name) {
  TORCH_CHECK_TYPE(x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16, name,
                   " must be float32 or bfloat16, got ", x.scalar_type());
  check_device(x, at::kCPU, name);
}

inline void check_tensor(const at::Tensor& value, at::IntArrayRef sizes, at::ScalarType type,
                         const char* name) {
  check_tensor(value, sizes, type, at::kCPU, name);
}

// x [N, C, H, W], or a copy of it, with the channels of a pixel side by side and the pixels in
// order, `ld` apart.
inline at::Tensor by_pixel(const at::Tensor& x, int64_t* ld) {
  const int64_t n = x.size(0), c = x.size(1), h = x.size(2), w = x.size(3);
  const auto lies = [](int64_t size, int64_t stride, int64_t wanted) {
    return size <= 1 || stride == wanted;
  };
  // The distance of two pixels, from the innermost dimension that has two.
  *ld = w > 1 ? x.stride(3) : h > 1 ? x.stride(2) : n > 1 ? x.stride(0) : c;
  if (lies(c, x.stride(1), 1) && *ld >= c && lies(w, x.stride(3), *ld) &&
      lies(h, x.stride(2), *ld * w) && lies(n, x.stride(0), *ld * w * h))
    return x;
  *ld = c;
  return x.contiguous(at::MemoryFormat::ChannelsLast);
}

// The type that statistics and coefficients of `type` tensors are kept in.
inline at::ScalarType wide_type(at::ScalarType type) {
  return type == at::kDouble ? at::kDouble : at::kFloat;
}

}  // namespace fastdiff
