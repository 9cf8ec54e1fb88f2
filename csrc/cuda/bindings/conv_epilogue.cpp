// conv_epilogue on CUDA tensors.
#include "cuda/conv_epilogue.h"

#include "cuda/bindings/common.h"

namespace fastdiff::cuda {
namespace {

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

}  // namespace

TORCH_LIBRARY_FRAGMENT(FASTDIFF_NAMESPACE, m) {
  m.def(
      "conv_epilogue(Tensor x, Tensor? bias, Tensor? emb, Tensor? residual, int spans) "
      "-> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(FASTDIFF_NAMESPACE, FASTDIFF_KEY, m) { m.impl("conv_epilogue", conv_epilogue); }

}  // namespace fastdiff::cuda
