// fastdiff::add_time_embedding on CPU tensors; the arithmetic is in kernels/add_time_embedding.cpp.
#include "cpu/kernels/add_time_embedding.h"

#include <torch/library.h>

#include "cpu/tensors.h"

namespace fastdiff {
namespace {

at::Tensor add_time_embedding_cpu(const at::Tensor& x, const at::Tensor& emb) {
  check_floating(x, "x");
  TORCH_CHECK_VALUE(x.dim() >= 2, "x must be [N, C, ...], got ", x.sizes());
  check_tensor(emb, x.sizes().slice(0, 2), x.scalar_type(), "emb");

  const auto format = layout_of(x);
  const auto dense = x.contiguous(format), e = emb.contiguous();
  auto out = empty_like(x, format);
  if (out.numel() == 0) return out;

  const bool channels_last = format != at::MemoryFormat::Contiguous;
  const int64_t n = x.size(0), channels = x.size(1), pixels = x.numel() / (n * channels);
  const AddTimeEmbeddingArgs args{
      x.scalar_type(),    channels_last,         channels, pixels, dense.const_data_ptr(),
      e.const_data_ptr(), out.mutable_data_ptr()};
  const int64_t length = channels_last ? channels : pixels;
  const auto kernel = FASTDIFF_KERNEL(add_time_embedding);
  at::parallel_for(0, out.numel() / length, std::max<int64_t>(1, kGrain / length),
                   [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(fastdiff, CPU, m) { m.impl("add_time_embedding", add_time_embedding_cpu); }

}  // namespace fastdiff
