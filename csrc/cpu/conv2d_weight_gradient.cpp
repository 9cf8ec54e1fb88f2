#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>

#include "cpu/conv2d_algorithms.h"
#include "cpu/conv2d_input.h"
#include "cpu/conv2d_spec.h"
#include "cpu/tensors.h"

namespace fastdiff {
namespace {

std::tuple<at::Tensor, at::Tensor> conv2d_weight_gradient_cpu(
    const at::Tensor& dy, const at::Tensor& x, at::IntArrayRef numbers, int64_t number,
    const OptionalTensor& skip, const OptionalTensor& norm) {
  const auto& algorithm = conv2d_algorithm(number);
  const ConvSpec spec = decode_spec(numbers);
  const auto reason = algorithm.weight_gradient_refusal(spec);
  TORCH_CHECK_VALUE(!reason, *reason, ", got the convolution ", numbers);
  const auto type = x.scalar_type();
  TORCH_CHECK_TYPE(algorithm.takes(type), algorithm.name, " is not for ", type);
  ConvInput input(spec, x, skip, norm);
  const Conv2d& read = input.p;
  const int64_t n = read.images, k = spec.filters;
  check_tensor(dy, {n, k, read.out_height, read.out_width}, type, "dy");
  const auto wide = x.options().dtype(at::kFloat);
  auto dw = at::empty({k, spec.channels, spec.kernel_h, spec.kernel_w}, wide,
                      at::MemoryFormat::ChannelsLast);
  auto sums = at::empty({n, k}, wide);
  if (n == 0) return {dw.zero_(), sums};

  input.hold();
  ConvWeightGradient p{read};
  const auto dy_held = by_pixel(dy, &p.dy_ld);
  p.dy = dy_held.const_data_ptr();
  p.dw = dw.mutable_data_ptr<float>();
  p.sums = sums.mutable_data_ptr<float>();
  algorithm.weight_gradient(p);
  return {dw, sums};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastdiff, CPU, m) {
  m.impl("conv2d_weight_gradient", conv2d_weight_gradient_cpu);
}

}  // namespace fastdiff
