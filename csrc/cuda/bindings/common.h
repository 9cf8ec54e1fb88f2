// Helpers of all bindings: devices, checks, and tensors prepared for the kernels.
//
// Each file of this folder checks the arguments of one family of operations, allocates their
// results, starts their kernels and registers them with PyTorch. No other file of csrc/cuda
// includes a header of PyTorch, except binding.cpp.
//
// No binding reads a value from the device or waits for the device, and all memory comes from
// PyTorch's allocator, so that every operation can be captured in a CUDA graph. Where a value on
// the device is wrong (a timestep, a step), the kernel writes NaN.
//
// Compiled with -DFASTDIFF_EMULATE the same operations take CPU tensors, in the namespace
// fastdiff_emulated, and the kernels run on the host (tools/emulation).
#pragma once

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "cuda/launch.h"
#include "tensors.h"

#ifdef FASTDIFF_EMULATE
#define FASTDIFF_NAMESPACE fastdiff_emulated
#define FASTDIFF_KEY CPU
#else
#define FASTDIFF_NAMESPACE fastdiff_cuda
#define FASTDIFF_KEY CUDA
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace fastdiff::cuda {

using Optional = std::optional<at::Tensor>;

// Makes the device of x current, and holds its current stream.
#ifdef FASTDIFF_EMULATE
constexpr auto kDevice = at::kCPU;
struct OnDevice {
  explicit OnDevice(const at::Tensor&) {}
  static bool capturing() { return false; }
  Stream stream = nullptr;
};
#else
constexpr auto kDevice = at::kCUDA;
struct OnDevice {
  explicit OnDevice(const at::Tensor& x)
      : guard(x.device()), stream(c10::cuda::getCurrentCUDAStream().stream()) {}
  static bool capturing() {
    return c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None;
  }
  c10::cuda::CUDAGuard guard;
  Stream stream;
};
#endif

inline Dtype dtype_of(const at::Tensor& x, const char* name) {
  const auto type = x.scalar_type();
  TORCH_CHECK_TYPE(type == at::kFloat || type == at::kBFloat16 || type == at::kHalf, name,
                   " must be float32, bfloat16 or float16, got ", type);
  TORCH_CHECK_VALUE(x.device().type() == kDevice, name, " must be on ", kDevice, ", got ",
                    x.device());
  return type == at::kFloat      ? Dtype::Float32
         : type == at::kBFloat16 ? Dtype::BFloat16
                                 : Dtype::Float16;
}

// The sizes of a tensor [N, C, ...] that the kernels need; [N] counts as [N, 1].
struct Images {
  Dtype dtype;
  at::MemoryFormat format;
  bool channels_last;
  int64_t images, channels, pixels;

  Images(const at::Tensor& x, const char* name, int64_t dims = 2)
      : dtype(dtype_of(x, name)), format(layout_of(x)) {
    TORCH_CHECK_VALUE(x.dim() >= dims, name, " must be ", dims == 2 ? "[N, C, ...]" : "[N, ...]",
                      ", got ", x.sizes());
    channels_last = format != at::MemoryFormat::Contiguous;
    images = x.size(0);
    channels = x.dim() > 1 ? x.size(1) : 1;
    pixels = x.numel() / std::max<int64_t>(1, images * channels);
  }
};

// A new tensor with the dtype and the device of x.
inline at::Tensor empty(at::IntArrayRef sizes, const at::Tensor& x,
                        at::MemoryFormat format = at::MemoryFormat::Contiguous) {
  return at::empty(sizes, x.options().memory_format(format));
}

inline at::Tensor workspace_for(int64_t bytes, const at::Tensor& x) {
  return at::empty({bytes}, x.options().dtype(at::kByte));
}

// Inputs made dense, and kept alive until the kernels are launched.
class Held {
 public:
  const void* operator()(const Optional& value,
                         at::MemoryFormat format = at::MemoryFormat::Contiguous) {
    if (!value) return nullptr;
    return tensors_.emplace_back(value->contiguous(format)).const_data_ptr();
  }
  template <class T>
  const T* as(const Optional& value) {
    return static_cast<const T*>((*this)(value));
  }

 private:
  std::vector<at::Tensor> tensors_;
};

inline void check_optional(const Optional& value, at::IntArrayRef sizes, const at::Tensor& x,
                           const char* name) {
  if (value) check_tensor(*value, sizes, x.scalar_type(), x.device(), name);
}

// The seed and the number of each image.
inline void check_seed(const at::Tensor& seed, const at::Tensor& x) {
  check_tensor(seed, {x.size(0), 2}, at::kLong, x.device(), "seed");
}

// A tensor of one element, which the kernel reads and the host does not.
inline void check_scalar(const at::Tensor& value, at::ScalarType type, const at::Tensor& x,
                         const char* name) {
  TORCH_CHECK_TYPE(value.scalar_type() == type && value.numel() == 1, name, " must be a ", type,
                   " tensor of one element, got ", value.scalar_type(), " ", value.sizes());
  check_device(value, x.device(), name);
}

}  // namespace fastdiff::cuda
