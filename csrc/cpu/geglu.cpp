// fastdiff::geglu on CPU tensors; the arithmetic is in kernels/geglu.cpp.
#include "cpu/kernels/geglu.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "cpu/tensors.h"

namespace fastdiff {
namespace {

at::Tensor geglu_cpu(const at::Tensor& x) {
  const auto type = x.scalar_type();
  check_float_or_bfloat16(x, "x");
  TORCH_CHECK_VALUE(x.dim() >= 1 && x.size(-1) % 2 == 0, "x must be [..., 2D], got ", x.sizes());
  auto sizes = x.sizes().vec();
  sizes.back() /= 2;
  auto out = at::empty(sizes, x.options());
  if (out.numel() == 0) return out;
  const auto dense = x.contiguous();
  const int64_t width = sizes.back();
  const Geglu p{type, width, dense.const_data_ptr(), out.mutable_data_ptr()};
  at::parallel_for(0, out.numel() / width, std::max<int64_t>(1, kHeavyGrain / width),
                   [&](int64_t begin, int64_t end) { FASTDIFF_KERNEL(geglu)(p, begin, end); });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(fastdiff, CPU, m) { m.impl("geglu", geglu_cpu); }

}  // namespace fastdiff
