// upsample_nearest2x and its gradient on CUDA tensors.
#include "cuda/upsample_nearest2x.h"

#include "cuda/bindings/common.h"

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

}  // namespace

TORCH_LIBRARY_FRAGMENT(FASTDIFF_NAMESPACE, m) {
  m.def("upsample_nearest2x(Tensor x) -> Tensor");
  m.def("upsample_nearest2x_backward(Tensor grad) -> Tensor");
}

TORCH_LIBRARY_IMPL(FASTDIFF_NAMESPACE, FASTDIFF_KEY, m) {
  m.impl("upsample_nearest2x", upsample_nearest2x);
  m.impl("upsample_nearest2x_backward", upsample_nearest2x_backward);
}

}  // namespace fastdiff::cuda
