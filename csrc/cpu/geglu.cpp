// fastdiff::geglu and its gradient on CPU tensors; the arithmetic is in kernels/geglu.cpp.
#include "cpu/kernels/geglu.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "cpu/tensors.h"

namespace fastdiff {
namespace {

// The shape of the result.
std::vector<int64_t> check(const at::Tensor& x) {
  check_float_or_bfloat16(x, "x");
  TORCH_CHECK_VALUE(x.dim() >= 1 && x.size(-1) % 2 == 0, "x must be [..., 2D], got ", x.sizes());
  auto sizes = x.sizes().vec();
  sizes.back() /= 2;
  return sizes;
}

template <class Kernel, class Params>
void run(Kernel kernel, const Params& p, int64_t rows) {
  at::parallel_for(0, rows, std::max<int64_t>(1, kHeavyGrain / p.width),
                   [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
}

at::Tensor geglu_cpu(const at::Tensor& x) {
  const auto sizes = check(x);
  auto out = at::empty(sizes, x.options());
  if (out.numel() == 0) return out;
  const auto dense = x.contiguous();
  const int64_t width = sizes.back();
  const Geglu p{x.scalar_type(), width, dense.const_data_ptr(), out.mutable_data_ptr()};
  run(FASTDIFF_KERNEL(geglu), p, out.numel() / width);
  return out;
}

at::Tensor geglu_backward_cpu(const at::Tensor& grad, const at::Tensor& x) {
  const auto sizes = check(x);
  check_tensor(grad, sizes, x.scalar_type(), "grad");
  auto dx = at::empty(x.sizes(), x.options());
  if (dx.numel() == 0) return dx;
  const auto dense_grad = grad.contiguous(), dense_x = x.contiguous();
  const int64_t width = sizes.back();
  const GegluBackward p{x.scalar_type(), width, dense_grad.const_data_ptr(),
                        dense_x.const_data_ptr(), dx.mutable_data_ptr()};
  run(FASTDIFF_KERNEL(geglu_backward), p, grad.numel() / width);
  return dx;
}

}  // namespace

TORCH_LIBRARY_IMPL(fastdiff, CPU, m) {
  m.impl("geglu", geglu_cpu);
  m.impl("geglu_backward", geglu_backward_cpu);
}

}  // namespace fastdiff
