// The operations as PyTorch calls them; binding.cpp registers them, with their schemas.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace fastdiff::cuda {

using Optional = std::optional<at::Tensor>;

std::tuple<at::Tensor, at::Tensor, at::Tensor> group_norm_silu(
    const at::Tensor& x, int64_t groups, const Optional& weight, const Optional& bias, double eps,
    const Optional& add, const Optional& scale, const Optional& shift, const Optional& residual,
    bool silu, const Optional& skip, const Optional& statistics);

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
group_norm_silu_backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& mean,
                         const at::Tensor& rstd, int64_t groups, const Optional& weight,
                         const Optional& bias, const Optional& add, const Optional& scale,
                         const Optional& shift, bool silu, const Optional& skip);

at::Tensor add_time_embedding(const at::Tensor& x, const at::Tensor& emb);

std::tuple<at::Tensor, at::Tensor> conv_epilogue(const at::Tensor& x, const Optional& bias,
                                                 const Optional& emb, const Optional& residual,
                                                 int64_t spans);

at::Tensor upsample_nearest2x(const at::Tensor& x);
at::Tensor upsample_nearest2x_backward(const at::Tensor& grad);

at::Tensor q_sample(const at::Tensor& x0, const at::Tensor& t, const at::Tensor& noise,
                    const at::Tensor& signal, const at::Tensor& sigma);

at::Tensor q_sample_from_seed(const at::Tensor& x0, const at::Tensor& t, const at::Tensor& seed,
                              const at::Tensor& row, const at::Tensor& signal,
                              const at::Tensor& sigma);

at::Tensor denoising_loss(const at::Tensor& prediction, const Optional& x0, const Optional& noise,
                          const at::Tensor& t, const at::Tensor& target_x0,
                          const at::Tensor& target_noise, const at::Tensor& weight);

at::Tensor denoising_loss_backward(const at::Tensor& grad, const at::Tensor& prediction,
                                   const Optional& x0, const Optional& noise, const at::Tensor& t,
                                   const at::Tensor& target_x0, const at::Tensor& target_noise,
                                   const at::Tensor& weight);

at::Tensor denoising_loss_from_seed(const at::Tensor& prediction, const Optional& x0,
                                    const at::Tensor& seed, const at::Tensor& row,
                                    const at::Tensor& t, const at::Tensor& target_x0,
                                    const at::Tensor& target_noise, const at::Tensor& weight);

at::Tensor denoising_loss_from_seed_backward(const at::Tensor& grad, const at::Tensor& prediction,
                                             const Optional& x0, const at::Tensor& seed,
                                             const at::Tensor& row, const at::Tensor& t,
                                             const at::Tensor& target_x0,
                                             const at::Tensor& target_noise,
                                             const at::Tensor& weight);

void philox_normal(const at::Tensor& seed, int64_t row, const at::Tensor& out);

void sampler_step(const at::Tensor& x, const at::Tensor& model_out, const Optional& history,
                  const Optional& noise, const at::Tensor& table, const at::Tensor& step,
                  const Optional& seed, const at::Tensor& out);

void ema_update(at::TensorList averages, at::TensorList parameters, const at::Tensor& weight);

}  // namespace fastdiff::cuda
