// fastdiff::adamw_update and fastdiff::gradient_norm on CPU tensors: checks, and the division among
// threads. The arithmetic is in kernels/adamw_update.cpp.
#include "cpu/kernels/adamw_update.h"

#include <ATen/ops/scalar_tensor.h>
#include <torch/library.h>

#include <cmath>
#include <vector>

#include "cpu/tensor_list.h"

namespace fastdiff {
namespace {

void adamw_update_cpu(at::TensorList parameters, at::TensorList gradients, at::TensorList exp_avgs,
                      at::TensorList exp_avg_sqs, at::TensorList averages, double lr, double beta1,
                      double beta2, double eps, double weight_decay, int64_t step,
                      double gradient_factor, double average_weight) {
  const auto count = parameters.size();
  const auto check_count = [&](at::TensorList list, const char* name) {
    TORCH_CHECK_VALUE(list.size() == count, "there must be as many ", name, " as parameters, got ",
                      list.size(), " and ", count);
  };
  check_count(gradients, "gradients");
  check_count(exp_avgs, "exp_avgs");
  check_count(exp_avg_sqs, "exp_avg_sqs");
  if (!averages.empty()) check_count(averages, "averages");
  TORCH_CHECK_VALUE(step >= 1, "step must be counted from 1, got ", step);
  TORCH_CHECK_VALUE(beta1 >= 0 && beta1 < 1 && beta2 >= 0 && beta2 < 1,
                    "betas must lie in [0, 1), got ", beta1, " and ", beta2);
  if (count == 0) return;
  const auto type = parameters[0].scalar_type();
  TORCH_CHECK_TYPE(type == at::kFloat || type == at::kDouble,
                   "parameters must be float32 or float64, got ", type);
  std::vector<AdamwTensors> tensors;
  for (size_t i = 0; i < count; ++i) {
    const auto& p = parameters[i];
    const auto check = [&](const at::Tensor& value, const char* name) {
      check_tensor(value, p.sizes(), type, name);
      TORCH_CHECK_VALUE(walk_together(p, value), name,
                        " must lie in memory as its parameter, with "
                        "strides ",
                        p.strides(), " without gaps, got ", value.strides());
    };
    check(p, "a parameter");
    check(gradients[i], "a gradient");
    check(exp_avgs[i], "an exp_avg");
    check(exp_avg_sqs[i], "an exp_avg_sq");
    if (!averages.empty()) check(averages[i], "an average");
    tensors.push_back({p.mutable_data_ptr(), gradients[i].const_data_ptr(),
                       exp_avgs[i].mutable_data_ptr(), exp_avg_sqs[i].mutable_data_ptr(),
                       averages.empty() ? nullptr : averages[i].mutable_data_ptr()});
  }
  const auto k = static_cast<double>(step);
  const AdamwUpdate update{type,
                           gradient_factor,
                           1 - lr * weight_decay,
                           beta1,
                           beta2,
                           lr / (1 - std::pow(beta1, k)),
                           std::sqrt(1 - std::pow(beta2, k)),
                           eps,
                           average_weight};
  const auto kernel = FASTDIFF_KERNEL(adamw_update);
  TensorList(parameters).for_each([&](int64_t, int64_t i, int64_t begin, int64_t end) {
    kernel(update, tensors[i], begin, end);
  });
  for (const auto& list : {parameters, exp_avgs, exp_avg_sqs, averages})
    for (const auto& value : list) bump_version(value);
}

at::Tensor gradient_norm_cpu(at::TensorList gradients) {
  std::vector<at::Tensor> held;
  for (const auto& gradient : gradients) {
    check_floating(gradient, "a gradient");
    held.push_back(walk_together(gradient, gradient) ? gradient : gradient.contiguous());
  }
  const TensorList list(held);
  std::vector<double> sums(list.units());
  const auto kernel = FASTDIFF_KERNEL(add_squares);
  list.for_each([&](int64_t unit, int64_t i, int64_t begin, int64_t end) {
    kernel(held[i].scalar_type(), held[i].const_data_ptr(), begin, end, sums[unit]);
  });
  double total = 0;
  for (const double sum : sums) total += sum;
  return at::scalar_tensor(std::sqrt(total), at::kDouble);
}

}  // namespace

TORCH_LIBRARY_IMPL(fastdiff, CPU, m) {
  m.impl("adamw_update", adamw_update_cpu);
  m.impl("gradient_norm", gradient_norm_cpu);
}

}  // namespace fastdiff
