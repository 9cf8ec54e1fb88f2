// add_time_embedding, conv_epilogue and upsample_nearest2x on CUDA tensors.
#include "cuda/add_time_embedding.h"
#include "cuda/bindings/common.h"
#include "cuda/bindings/operations.h"
#include "cuda/conv_epilogue.h"
#include "cuda/upsample_nearest2x.h"

namespace fastdiff::cuda {
namespace {

// `small` is x, or the gradient of x.
UpsampleNearest2xArgs upsampling(const Images& shape, const at::Tensor& small, const void* in,
                                 void* out) {
  return {.dtype = shape.dtype,
          .channels_last = shape.channels_last,
          .images = shape.images,
          .channels = shape.channels,
          .height = small.size(2),
          .width = small.size(3),
          .in = in,
          .out = out};
}

}  // namespace

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

std::tuple<at::Tensor, at::Tensor> conv_epilogue(const at::Tensor& x, const Optional& bias,
                                                 const Optional& emb, const Optional& residual,
                                                 int64_t spans) {
  const Images shape(x, "x");
  check_optional(bias, x.sizes().slice(1, 1), x, "bias");
  check_optional(emb, x.sizes().slice(0, 2), x, "emb");
  check_optional(residual, x.sizes(), x, "residual");
  TORCH_CHECK_VALUE(spans >= 0, "spans must not be negative, got ", spans);
  const OnDevice on(x);
  auto y = empty(x.sizes(), x, shape.format);
  const auto wide = x.options().dtype(at::kFloat);
  auto statistics =
      spans ? at::empty({shape.images, spans, 4, shape.channels}, wide) : at::empty({0}, wide);
  if (y.numel() == 0) return {y, statistics.zero_()};
  Held held;
  conv_epilogue_cuda({.dtype = shape.dtype,
                      .channels_last = shape.channels_last,
                      .images = shape.images,
                      .channels = shape.channels,
                      .pixels = shape.pixels,
                      .spans = spans,
                      .x = held(x, shape.format),
                      .bias = held(bias),
                      .emb = held(emb),
                      .residual = held(residual, shape.format),
                      .y = y.mutable_data_ptr(),
                      .statistics = spans ? statistics.mutable_data_ptr<float>() : nullptr},
                     on.stream);
  return {y, statistics};
}

at::Tensor upsample_nearest2x(const at::Tensor& x) {
  const Images shape(x, "x");
  TORCH_CHECK_VALUE(x.dim() == 4, "x must be [N, C, H, W], got ", x.sizes());
  const OnDevice on(x);
  auto y = empty({shape.images, shape.channels, 2 * x.size(2), 2 * x.size(3)}, x, shape.format);
  if (y.numel() == 0) return y;
  Held held;
  upsample_nearest2x_cuda(upsampling(shape, x, held(x, shape.format), y.mutable_data_ptr()),
                          on.stream);
  return y;
}

at::Tensor upsample_nearest2x_backward(const at::Tensor& grad) {
  const Images shape(grad, "grad");
  TORCH_CHECK_VALUE(grad.dim() == 4 && grad.size(2) % 2 == 0 && grad.size(3) % 2 == 0,
                    "grad must be [N, C, 2 H, 2 W], got ", grad.sizes());
  const OnDevice on(grad);
  auto dx =
      empty({shape.images, shape.channels, grad.size(2) / 2, grad.size(3) / 2}, grad, shape.format);
  if (dx.numel() == 0) return dx;
  Held held;
  upsample_nearest2x_backward_cuda(
      upsampling(shape, dx, held(grad, shape.format), dx.mutable_data_ptr()), on.stream);
  return dx;
}

}  // namespace fastdiff::cuda
