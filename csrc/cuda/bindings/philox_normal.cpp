// philox_normal on CUDA tensors.
#include "cuda/philox_normal.h"

#include "cuda/bindings/common.h"

namespace fastdiff::cuda {
namespace {

void philox_normal(const at::Tensor& seed, int64_t row, const at::Tensor& out) {
  const Images shape(out, "out", 1);
  check_seed(seed, out);
  TORCH_CHECK_VALUE(row >= 0 && row <= 0xFFFFFFFF, "row must lie in 0..2^32-1, got ", row);
  if (out.numel() == 0) return;
  const OnDevice on(out);
  const auto dense = out.is_contiguous() ? out : empty(out.sizes(), out);
  Held held;
  philox_normal_cuda({.dtype = shape.dtype,
                      .images = shape.images,
                      .image = shape.channels * shape.pixels,
                      .seed = held.as<int64_t>(seed),
                      .row = static_cast<uint32_t>(row),
                      .out = dense.mutable_data_ptr()},
                     on.stream);
  if (!dense.is_same(out)) out.copy_(dense);
  bump_version(out);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(FASTDIFF_NAMESPACE, m) {
  m.def("philox_normal(Tensor seed, int row, Tensor(a!) out) -> ()");
}

TORCH_LIBRARY_IMPL(FASTDIFF_NAMESPACE, FASTDIFF_KEY, m) { m.impl("philox_normal", philox_normal); }

}  // namespace fastdiff::cuda
