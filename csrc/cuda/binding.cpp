// The Python module fastdiff._cuda. Importing it defines the operations of the namespace
// fastdiff_cuda, which fastdiff/ops/gpu.py calls; bindings/ holds them. Nothing else in csrc/cuda
// sees PyTorch.
//
// Compiled with -DFASTDIFF_EMULATE the same operations take CPU tensors, in fastdiff_emulated, and
// the kernels run on the host (tests/emulation).
#include <torch/library.h>

#include "cuda/bindings/operations.h"

#ifdef FASTDIFF_EMULATE
#define FASTDIFF_NAMESPACE fastdiff_emulated
#define FASTDIFF_KEY CPU
#else
#define FASTDIFF_NAMESPACE fastdiff_cuda
#define FASTDIFF_KEY CUDA
#include <pybind11/pybind11.h>
#endif

namespace fastdiff::cuda {

TORCH_LIBRARY(FASTDIFF_NAMESPACE, m) {
  m.def(
      "group_norm_silu(Tensor x, int num_groups, Tensor? weight, Tensor? bias, float eps, "
      "Tensor? add, Tensor? scale, Tensor? shift, Tensor? residual, bool silu, "
      "Tensor? skip=None, Tensor? statistics=None) -> (Tensor, Tensor, Tensor)");
  m.def(
      "group_norm_silu_backward(Tensor grad, Tensor x, Tensor mean, Tensor rstd, int num_groups, "
      "Tensor? weight, Tensor? bias, Tensor? add, Tensor? scale, Tensor? shift, bool silu, "
      "Tensor? skip=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("add_time_embedding(Tensor x, Tensor emb) -> Tensor");
  m.def(
      "conv_epilogue(Tensor x, Tensor? bias, Tensor? emb, Tensor? residual, int spans) "
      "-> (Tensor, Tensor)");
  m.def("upsample_nearest2x(Tensor x) -> Tensor");
  m.def("upsample_nearest2x_backward(Tensor grad) -> Tensor");
  m.def(
      "q_sample(Tensor x0, Tensor t, Tensor noise, Tensor sqrt_alphas_cumprod, "
      "Tensor sqrt_one_minus_alphas_cumprod) -> Tensor");
  m.def(
      "q_sample_from_seed(Tensor x0, Tensor t, Tensor seed, Tensor row, "
      "Tensor sqrt_alphas_cumprod, Tensor sqrt_one_minus_alphas_cumprod) -> Tensor");
  m.def(
      "denoising_loss(Tensor prediction, Tensor? x0, Tensor? noise, Tensor t, Tensor target_x0, "
      "Tensor target_noise, Tensor weight) -> Tensor");
  m.def(
      "denoising_loss_backward(Tensor grad, Tensor prediction, Tensor? x0, Tensor? noise, "
      "Tensor t, Tensor target_x0, Tensor target_noise, Tensor weight) -> Tensor");
  m.def(
      "denoising_loss_from_seed(Tensor prediction, Tensor? x0, Tensor seed, Tensor row, Tensor t, "
      "Tensor target_x0, Tensor target_noise, Tensor weight) -> Tensor");
  m.def(
      "denoising_loss_from_seed_backward(Tensor grad, Tensor prediction, Tensor? x0, Tensor seed, "
      "Tensor row, Tensor t, Tensor target_x0, Tensor target_noise, Tensor weight) -> Tensor");
  m.def("philox_normal(Tensor seed, int row, Tensor(a!) out) -> ()");
  m.def(
      "sampler_step(Tensor x, Tensor model_out, Tensor(a!)? history, Tensor? noise, "
      "Tensor table, Tensor step, Tensor? seed, Tensor(b!) out) -> ()");
  m.def("ema_update(Tensor(a!)[] averages, Tensor[] parameters, Tensor weight) -> ()");
}

TORCH_LIBRARY_IMPL(FASTDIFF_NAMESPACE, FASTDIFF_KEY, m) {
  m.impl("group_norm_silu", group_norm_silu);
  m.impl("group_norm_silu_backward", group_norm_silu_backward);
  m.impl("add_time_embedding", add_time_embedding);
  m.impl("conv_epilogue", conv_epilogue);
  m.impl("upsample_nearest2x", upsample_nearest2x);
  m.impl("upsample_nearest2x_backward", upsample_nearest2x_backward);
  m.impl("q_sample", q_sample);
  m.impl("q_sample_from_seed", q_sample_from_seed);
  m.impl("denoising_loss", denoising_loss);
  m.impl("denoising_loss_backward", denoising_loss_backward);
  m.impl("denoising_loss_from_seed", denoising_loss_from_seed);
  m.impl("denoising_loss_from_seed_backward", denoising_loss_from_seed_backward);
  m.impl("philox_normal", philox_normal);
  m.impl("sampler_step", sampler_step);
  m.impl("ema_update", ema_update);
}

}  // namespace fastdiff::cuda

#ifndef FASTDIFF_EMULATE
PYBIND11_MODULE(_cuda, m) {
  m.doc() = "fastdiff's CUDA kernels";
  m.attr("torch_version") = FASTDIFF_TORCH_VERSION;
  m.attr("architectures") = FASTDIFF_ARCHITECTURES;  // as TORCH_CUDA_ARCH_LIST writes them
}
#endif
