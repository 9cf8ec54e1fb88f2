// fastdiff::ema_update on CPU tensors: checks, and the division among threads. The arithmetic is in
// kernels/ema_update.cpp.
#include "cpu/kernels/ema_update.h"

#include <torch/library.h>

#include <vector>

#include "cpu/tensor_list.h"

namespace fastdiff {
namespace {

void ema_update_cpu(at::TensorList averages, at::TensorList parameters, const at::Tensor& weight) {
  TORCH_CHECK_VALUE(averages.size() == parameters.size(),
                    "there must be as many averages as parameters, got ", averages.size(), " and ",
                    parameters.size());
  TORCH_CHECK_TYPE(weight.scalar_type() == at::kFloat && weight.numel() == 1,
                   "weight must be a float32 tensor of one element, got ", weight.scalar_type(),
                   " of shape ", weight.sizes());
  check_device(weight, at::kCPU, "weight");
  std::vector<at::Tensor> written;
  std::vector<at::Tensor> held;
  std::vector<EmaTensors> pairs;
  for (size_t i = 0; i < averages.size(); ++i) {
    const auto &average = averages[i], &parameter = parameters[i];
    check_floating(average, "an average");
    check_floating(parameter, "a parameter");
    check_tensor(parameter, average.sizes(), parameter.scalar_type(), "a parameter");
    const bool together = walk_together(average, parameter);
    written.push_back(together ? average : average.contiguous());
    held.push_back(together ? parameter : parameter.contiguous());
    pairs.push_back({average.scalar_type(), parameter.scalar_type(),
                     written.back().mutable_data_ptr(), held.back().const_data_ptr()});
  }
  const double amount = weight.item<float>();
  const auto kernel = FASTDIFF_KERNEL(ema_update);
  TensorList(averages).for_each([&](int64_t, int64_t i, int64_t begin, int64_t end) {
    kernel(pairs[i], amount, begin, end);
  });
  for (size_t i = 0; i < averages.size(); ++i) {
    if (!written[i].is_same(averages[i])) averages[i].copy_(written[i]);
    bump_version(averages[i]);
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(fastdiff, CPU, m) { m.impl("ema_update", ema_update_cpu); }

}  // namespace fastdiff
