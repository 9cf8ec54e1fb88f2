// fastdiff::q_sample on CPU tensors; the arithmetic is in kernels/q_sample.cpp.
#include "cpu/kernels/q_sample.h"

#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "cpu/tensors.h"

namespace fastdiff {
namespace {

void check_table(const at::Tensor& table, const at::Tensor& x0, int64_t length, const char* name) {
  TORCH_CHECK_VALUE(table.dim() == 1 && table.numel() == length, name, " must have shape [", length,
                    "], got ", table.sizes());
  TORCH_CHECK_TYPE(table.scalar_type() == wide_type(x0.scalar_type()), name, " must be ",
                   wide_type(x0.scalar_type()), ", got ", table.scalar_type());
  TORCH_CHECK_VALUE(table.device().is_cpu(), name, " must be on the CPU, got ", table.device());
}

at::Tensor q_sample_cpu(const at::Tensor& x0, const at::Tensor& t, const at::Tensor& noise,
                        const at::Tensor& signal, const at::Tensor& sigma) {
  check_floating(x0, "x0");
  check_like(noise, x0, "noise");
  TORCH_CHECK_VALUE(x0.dim() >= 1, "x0 must be [N, ...], got a scalar");
  TORCH_CHECK_TYPE(t.scalar_type() == at::kLong, "t must be int64, got ", t.scalar_type());
  TORCH_CHECK_VALUE(t.device().is_cpu() && t.dim() == 1 && t.size(0) == x0.size(0),
                    "t must be a CPU tensor of shape [", x0.size(0), "], got ", t.sizes());
  check_table(signal, x0, signal.numel(), "sqrt_alphas_cumprod");
  check_table(sigma, x0, signal.numel(), "sqrt_one_minus_alphas_cumprod");

  const auto format = layout_of(x0);
  const auto x = x0.contiguous(format), z = noise.contiguous(format);
  const auto steps = t.contiguous(), s = signal.contiguous(), e = sigma.contiguous();
  auto out = at::empty_like(x0, x0.options().memory_format(format));
  if (out.numel() == 0) return out;

  const int64_t* timestep = steps.const_data_ptr<int64_t>();
  const auto [low, high] = std::minmax_element(timestep, timestep + x0.size(0));
  TORCH_CHECK_INDEX(*low >= 0 && *high < s.numel(), "t must lie in 0..", s.numel() - 1,
                    " (the schedule's steps), got values from ", *low, " to ", *high);

  const QSampleArgs args{x0.scalar_type(),   x.numel() / x.size(0),  x.const_data_ptr(),
                         z.const_data_ptr(), out.mutable_data_ptr(), timestep,
                         s.const_data_ptr(), e.const_data_ptr()};
  const auto kernel = FASTDIFF_KERNEL(q_sample);
  at::parallel_for(0, out.numel(), kGrain,
                   [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(fastdiff, CPU, m) { m.impl("q_sample", q_sample_cpu); }

}  // namespace fastdiff
