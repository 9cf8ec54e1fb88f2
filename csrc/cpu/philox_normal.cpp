// fastdiff::philox_normal on CPU tensors; the arithmetic is in kernels/philox.h.
#include "cpu/philox_normal.h"

#include <torch/library.h>

#include "cpu/kernels/philox_normal.h"
#include "cpu/tensors.h"

namespace fastdiff {

void check_seed(const at::Tensor& seed, const at::Tensor& x) {
  TORCH_CHECK_VALUE(x.dim() >= 1, "images must be [N, ...], got a scalar");
  check_tensor(seed, {x.size(0), 2}, at::kLong, "seed");
}

uint32_t row_number(const at::Tensor& row) {
  TORCH_CHECK_TYPE(row.scalar_type() == at::kLong && row.numel() == 1,
                   "row must be an int64 tensor of one element, got ", row.scalar_type(), " ",
                   row.sizes());
  check_device(row, at::kCPU, "row");
  return static_cast<uint32_t>(*row.const_data_ptr<int64_t>());
}

void fill_philox_normal(const at::Tensor& seed, uint32_t row, const at::Tensor& out) {
  if (out.numel() == 0) return;
  const auto seeds = seed.contiguous();
  const int64_t images = out.size(0), image = out.numel() / images;
  const int64_t pieces = (image + kPhiloxPiece - 1) / kPhiloxPiece;
  const PhiloxNormalArgs args{
      out.scalar_type(),     image, pieces, seeds.const_data_ptr<int64_t>(), row,
      out.mutable_data_ptr()};
  const auto kernel = FASTDIFF_KERNEL(philox_normal);
  at::parallel_for(0, images * pieces, kHeavyGrain / kPhiloxPiece,
                   [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

namespace {

void philox_normal_cpu(const at::Tensor& seed, int64_t row, const at::Tensor& out) {
  check_floating(out, "out");
  check_seed(seed, out);
  TORCH_CHECK_VALUE(row >= 0 && row <= 0xFFFFFFFF, "row must lie in 0..2^32-1, got ", row);
  const auto dense = out.is_contiguous() ? out : at::empty_like(out, at::MemoryFormat::Contiguous);
  fill_philox_normal(seed, static_cast<uint32_t>(row), dense);
  if (!dense.is_same(out)) out.copy_(dense);
  bump_version(out);
}

}  // namespace

TORCH_LIBRARY_IMPL(fastdiff, CPU, m) { m.impl("philox_normal", philox_normal_cpu); }

}  // namespace fastdiff
