// fastdiff::denoising_loss, ..._from_seed and their backward on CPU tensors; the arithmetic is in
// kernels/denoising_loss.cpp.
#include "cpu/kernels/denoising_loss.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <optional>
#include <vector>

#include "cpu/choose_pieces.h"
#include "cpu/philox_normal.h"
#include "cpu/timesteps.h"

namespace fastdiff {
namespace {

using Optional = std::optional<at::Tensor>;

// The arguments of all four, checked and dense; it owns what the kernel's pointers point to.
struct Arguments {
  const at::Tensor& prediction;
  at::MemoryFormat format;
  at::ScalarType wide;
  std::vector<at::Tensor> kept;
  DenoisingLossArgs args{};

  Arguments(const at::Tensor& prediction, const Optional& x0, const at::Tensor& t,
            const at::Tensor& of_x0, const at::Tensor& of_noise, const at::Tensor& weight)
      : prediction(prediction) {
    check_floating(prediction, "prediction");
    TORCH_CHECK_VALUE(prediction.dim() >= 1, "prediction must be [N, ...], got a scalar");
    format = layout_of(prediction);
    wide = wide_type(prediction.scalar_type());
    if (x0) check_like(*x0, prediction, "x0");
    check_tensor(of_x0, {of_x0.numel()}, wide, "target_x0");
    check_tensor(of_noise, {of_x0.numel()}, wide, "target_noise");
    check_tensor(weight, {of_x0.numel()}, wide, "weight");
    args.dtype = prediction.scalar_type();
    args.pieces = pieces_of(prediction, format);
    args.t = keep(checked_timesteps(t, images(), of_x0.numel())).const_data_ptr<int64_t>();
    args.prediction = keep(prediction.contiguous(format)).const_data_ptr();
    if (x0) args.x0 = keep(x0->contiguous(format)).const_data_ptr();
    args.of_x0 = keep(of_x0.contiguous()).const_data_ptr();
    args.of_noise = keep(of_noise.contiguous()).const_data_ptr();
    args.weight = keep(weight.contiguous()).const_data_ptr();
  }

  void take_noise(const Optional& noise) {
    if (!noise) return;
    check_like(*noise, prediction, "noise");
    args.noise = keep(noise->contiguous(format)).const_data_ptr();
  }

  void take_seed(const at::Tensor& seed, const at::Tensor& row) {
    check_seed(seed, prediction);
    args.seed = keep(seed.contiguous()).const_data_ptr<int64_t>();
    args.row = row_number(row);
  }

  int64_t images() const { return prediction.size(0); }

  template <class Run>
  void in_pieces(Run&& run) const {
    at::parallel_for(0, images() * args.pieces.count,
                     grain_of(args.pieces, args.seed ? kHeavyGrain : kGrain), run);
  }

 private:
  const at::Tensor& keep(at::Tensor tensor) { return kept.emplace_back(std::move(tensor)); }
};

template <class Wide>
void weigh(const DenoisingLossArgs& a, const double* sums, int64_t images, Wide* loss) {
  const auto size = static_cast<double>(a.pieces.channels * a.pieces.pixels);
  for (int64_t n = 0; n < images; ++n) {
    double sum = 0;
    for (int64_t i = 0; i < a.pieces.count; ++i) sum += sums[n * a.pieces.count + i];
    loss[n] = static_cast<Wide>(static_cast<const Wide*>(a.weight)[a.t[n]] * (sum / size));
  }
}

at::Tensor forward(const Arguments& given) {
  const auto& args = given.args;
  const auto sums = at::empty({given.images() * args.pieces.count}, at::kDouble);
  const auto kernel = FASTDIFF_KERNEL(denoising_loss);
  auto* to = sums.mutable_data_ptr<double>();
  given.in_pieces([&](int64_t begin, int64_t end) { kernel(args, to, begin, end); });
  auto loss = at::empty({given.images()}, given.wide);
  if (given.wide == at::kDouble) {
    weigh(args, to, given.images(), loss.mutable_data_ptr<double>());
  } else {
    weigh(args, to, given.images(), loss.mutable_data_ptr<float>());
  }
  return loss;
}

at::Tensor backward(const at::Tensor& grad, const Arguments& given) {
  check_tensor(grad, {given.images()}, given.wide, "grad");
  const auto losses = grad.contiguous();
  auto out = empty_like(given.prediction, given.format);
  const auto kernel = FASTDIFF_KERNEL(denoising_loss_backward);
  const void* from = losses.const_data_ptr();
  void* to = out.mutable_data_ptr();
  given.in_pieces([&](int64_t begin, int64_t end) { kernel(given.args, from, to, begin, end); });
  return out;
}

at::Tensor denoising_loss_cpu(const at::Tensor& prediction, const Optional& x0,
                              const Optional& noise, const at::Tensor& t, const at::Tensor& of_x0,
                              const at::Tensor& of_noise, const at::Tensor& weight) {
  Arguments given(prediction, x0, t, of_x0, of_noise, weight);
  given.take_noise(noise);
  return forward(given);
}

at::Tensor denoising_loss_backward_cpu(const at::Tensor& grad, const at::Tensor& prediction,
                                       const Optional& x0, const Optional& noise,
                                       const at::Tensor& t, const at::Tensor& of_x0,
                                       const at::Tensor& of_noise, const at::Tensor& weight) {
  Arguments given(prediction, x0, t, of_x0, of_noise, weight);
  given.take_noise(noise);
  return backward(grad, given);
}

at::Tensor from_seed_cpu(const at::Tensor& prediction, const Optional& x0, const at::Tensor& seed,
                         const at::Tensor& row, const at::Tensor& t, const at::Tensor& of_x0,
                         const at::Tensor& of_noise, const at::Tensor& weight) {
  Arguments given(prediction, x0, t, of_x0, of_noise, weight);
  given.take_seed(seed, row);
  return forward(given);
}

at::Tensor from_seed_backward_cpu(const at::Tensor& grad, const at::Tensor& prediction,
                                  const Optional& x0, const at::Tensor& seed, const at::Tensor& row,
                                  const at::Tensor& t, const at::Tensor& of_x0,
                                  const at::Tensor& of_noise, const at::Tensor& weight) {
  Arguments given(prediction, x0, t, of_x0, of_noise, weight);
  given.take_seed(seed, row);
  return backward(grad, given);
}

}  // namespace

TORCH_LIBRARY_IMPL(fastdiff, CPU, m) {
  m.impl("denoising_loss", denoising_loss_cpu);
  m.impl("denoising_loss_backward", denoising_loss_backward_cpu);
  m.impl("denoising_loss_from_seed", from_seed_cpu);
  m.impl("denoising_loss_from_seed_backward", from_seed_backward_cpu);
}

}  // namespace fastdiff
