// denoising_loss and its gradient on CUDA tensors, with noise that is given or computed from a
// seed.
#include "cuda/denoising_loss.h"

#include <limits>

#include "cuda/bindings/common.h"

namespace fastdiff::cuda {
namespace {

// The arguments of all four operations, checked and dense, and their results. The noise is given
// (`noise`), computed from a seed (`seed`, `row`), or absent.
class Arguments {
 public:
  Arguments(const at::Tensor& prediction, const Optional& x0, const Optional& noise,
            const Optional& seed, const Optional& row, const at::Tensor& t, const at::Tensor& p,
            const at::Tensor& q, const at::Tensor& weight)
      : prediction_(prediction), shape_(prediction, "prediction", 1), on_(prediction) {
    if (x0) check_like(*x0, prediction, "x0");
    if (noise) check_like(*noise, prediction, "noise");
    if (seed) check_seed(*seed, prediction);
    if (row) check_scalar(*row, at::kLong, prediction, "row");
    const auto device = prediction.device();
    check_tensor(t, {shape_.images}, at::kLong, device, "t");
    check_tensor(p, {p.numel()}, at::kFloat, device, "target_x0");
    check_tensor(q, {p.numel()}, at::kFloat, device, "target_noise");
    check_tensor(weight, {p.numel()}, at::kFloat, device, "weight");
    args_ = {.dtype = shape_.dtype,
             .channels_last = shape_.channels_last,
             .images = shape_.images,
             .channels = shape_.channels,
             .pixels = shape_.pixels,
             .prediction = held_(prediction, shape_.format),
             .x0 = held_(x0, shape_.format),
             .noise = held_(noise, shape_.format),
             .seed = held_.as<int64_t>(seed),
             .row = held_.as<int64_t>(row),
             .t = held_.as<int64_t>(t),
             .steps = p.numel(),
             .target_x0 = held_.as<float>(p),
             .target_noise = held_.as<float>(q),
             .weight = held_.as<float>(weight)};
  }

  at::Tensor loss() const {
    auto loss = at::empty({args_.images}, prediction_.options().dtype(at::kFloat));
    if (prediction_.numel() == 0) return loss.fill_(std::numeric_limits<double>::quiet_NaN());
    const auto workspace = workspace_for(denoising_loss_workspace(args_), prediction_);
    denoising_loss_cuda(args_, loss.mutable_data_ptr<float>(), workspace.mutable_data_ptr(),
                        on_.stream);
    return loss;
  }

  at::Tensor gradient(const at::Tensor& grad) {
    check_tensor(grad, {args_.images}, at::kFloat, prediction_.device(), "grad");
    auto dprediction = empty(prediction_.sizes(), prediction_, shape_.format);
    if (dprediction.numel() == 0) return dprediction;
    denoising_loss_backward_cuda(args_, held_.as<float>(grad), dprediction.mutable_data_ptr(),
                                 on_.stream);
    return dprediction;
  }

 private:
  const at::Tensor& prediction_;
  Images shape_;
  OnDevice on_;
  Held held_;
  DenoisingLossArgs args_;
};

at::Tensor denoising_loss(const at::Tensor& prediction, const Optional& x0, const Optional& noise,
                          const at::Tensor& t, const at::Tensor& target_x0,
                          const at::Tensor& target_noise, const at::Tensor& weight) {
  return Arguments(prediction, x0, noise, {}, {}, t, target_x0, target_noise, weight).loss();
}

at::Tensor denoising_loss_backward(const at::Tensor& grad, const at::Tensor& prediction,
                                   const Optional& x0, const Optional& noise, const at::Tensor& t,
                                   const at::Tensor& target_x0, const at::Tensor& target_noise,
                                   const at::Tensor& weight) {
  return Arguments(prediction, x0, noise, {}, {}, t, target_x0, target_noise, weight)
      .gradient(grad);
}

at::Tensor denoising_loss_from_seed(const at::Tensor& prediction, const Optional& x0,
                                    const at::Tensor& seed, const at::Tensor& row,
                                    const at::Tensor& t, const at::Tensor& target_x0,
                                    const at::Tensor& target_noise, const at::Tensor& weight) {
  return Arguments(prediction, x0, {}, seed, row, t, target_x0, target_noise, weight).loss();
}

at::Tensor denoising_loss_from_seed_backward(const at::Tensor& grad, const at::Tensor& prediction,
                                             const Optional& x0, const at::Tensor& seed,
                                             const at::Tensor& row, const at::Tensor& t,
                                             const at::Tensor& target_x0,
                                             const at::Tensor& target_noise,
                                             const at::Tensor& weight) {
  return Arguments(prediction, x0, {}, seed, row, t, target_x0, target_noise, weight)
      .gradient(grad);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(FASTDIFF_NAMESPACE, m) {
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
}

TORCH_LIBRARY_IMPL(FASTDIFF_NAMESPACE, FASTDIFF_KEY, m) {
  m.impl("denoising_loss", denoising_loss);
  m.impl("denoising_loss_backward", denoising_loss_backward);
  m.impl("denoising_loss_from_seed", denoising_loss_from_seed);
  m.impl("denoising_loss_from_seed_backward", denoising_loss_from_seed_backward);
}

}  // namespace fastdiff::cuda
