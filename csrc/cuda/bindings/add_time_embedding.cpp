// add_time_embedding on CUDA tensors.
#include "cuda/add_time_embedding.h"

#include "cuda/bindings/common.h"

namespace fastdiff::cuda {
namespace {

at::Tensor add_time_embedding(const at::Tensor& x, const at::Tensor& emb) {
  const Images shape(x, "x");
  check_tensor(emb, x.sizes().slice(0, 2), x.scalar_type(), x.device(), "emb");
  const OnDevice on(x);
  auto out = empty(x.sizes(), x, shape.format);
  if (out.numel() == 0) return out;
  Held held;
  add_time_embedding_cuda({.dtype = shape.dtype,
                           .channels_last = shape.channels_last,
                           .images = shape.images,
                           .channels = shape.channels,
                           .pixels = shape.pixels,
                           .x = held(x, shape.format),
                           .emb = held(emb),
                           .out = out.mutable_data_ptr()},
                          on.stream);
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(FASTDIFF_NAMESPACE, m) {
  m.def("add_time_embedding(Tensor x, Tensor emb) -> Tensor");
}

TORCH_LIBRARY_IMPL(FASTDIFF_NAMESPACE, FASTDIFF_KEY, m) {
  m.impl("add_time_embedding", add_time_embedding);
}

}  // namespace fastdiff::cuda
