// q_sample on CUDA tensors, with noise that is given or computed from a seed.
#include "cuda/q_sample.h"

#include "cuda/bindings/common.h"

namespace fastdiff::cuda {
namespace {

void check_forward_process(const at::Tensor& x0, const at::Tensor& t, const at::Tensor& signal,
                           const at::Tensor& sigma) {
  check_tensor(t, x0.sizes().slice(0, 1), at::kLong, x0.device(), "t");
  check_tensor(signal, {signal.numel()}, at::kFloat, x0.device(), "sqrt_alphas_cumprod");
  check_tensor(sigma, {signal.numel()}, at::kFloat, x0.device(), "sqrt_one_minus_alphas_cumprod");
}

at::Tensor q_sample(const at::Tensor& x0, const at::Tensor& t, const at::Tensor& noise,
                    const at::Tensor& signal, const at::Tensor& sigma) {
  const Images shape(x0, "x0", 1);
  check_like(noise, x0, "noise");
  check_forward_process(x0, t, signal, sigma);
  const OnDevice on(x0);
  auto out = empty(x0.sizes(), x0, shape.format);
  if (out.numel() == 0) return out;
  Held held;
  q_sample_cuda({.dtype = shape.dtype,
                 .images = shape.images,
                 .image = shape.channels * shape.pixels,
                 .x0 = held(x0, shape.format),
                 .noise = held(noise, shape.format),
                 .out = out.mutable_data_ptr(),
                 .t = held.as<int64_t>(t),
                 .steps = signal.numel(),
                 .signal = held.as<float>(signal),
                 .sigma = held.as<float>(sigma)},
                on.stream);
  return out;
}

at::Tensor q_sample_from_seed(const at::Tensor& x0, const at::Tensor& t, const at::Tensor& seed,
                              const at::Tensor& row, const at::Tensor& signal,
                              const at::Tensor& sigma) {
  const Images shape(x0, "x0", 1);
  check_forward_process(x0, t, signal, sigma);
  check_seed(seed, x0);
  check_scalar(row, at::kLong, x0, "row");
  const OnDevice on(x0);
  auto out = empty(x0.sizes(), x0, shape.format);
  if (out.numel() == 0) return out;
  Held held;
  q_sample_from_seed_cuda({.dtype = shape.dtype,
                           .channels_last = shape.channels_last,
                           .images = shape.images,
                           .channels = shape.channels,
                           .pixels = shape.pixels,
                           .x0 = held(x0, shape.format),
                           .out = out.mutable_data_ptr(),
                           .t = held.as<int64_t>(t),
                           .steps = signal.numel(),
                           .signal = held.as<float>(signal),
                           .sigma = held.as<float>(sigma),
                           .seed = held.as<int64_t>(seed),
                           .row = held.as<int64_t>(row)},
                          on.stream);
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(FASTDIFF_NAMESPACE, m) {
  m.def(
      "q_sample(Tensor x0, Tensor t, Tensor noise, Tensor sqrt_alphas_cumprod, "
      "Tensor sqrt_one_minus_alphas_cumprod) -> Tensor");
  m.def(
      "q_sample_from_seed(Tensor x0, Tensor t, Tensor seed, Tensor row, "
      "Tensor sqrt_alphas_cumprod, Tensor sqrt_one_minus_alphas_cumprod) -> Tensor");
}

TORCH_LIBRARY_IMPL(FASTDIFF_NAMESPACE, FASTDIFF_KEY, m) {
  m.impl("q_sample", q_sample);
  m.impl("q_sample_from_seed", q_sample_from_seed);
}

}  // namespace fastdiff::cuda
