// fastdiff::q_sample on CPU tensors; the arithmetic is in kernels/q_sample.cpp.
#include "cpu/kernels/q_sample.h"

#include <torch/library.h>

#include "cpu/tensors.h"

namespace fastdiff {
namespace {

at::Tensor q_sample_cpu(const at::Tensor& x0, const at::Tensor& t, const at::Tensor& noise,
                        const at::Tensor& signal, const at::Tensor& sigma) {
  check_floating(x0, "x0");
  check_like(noise, x0, "noise");
  TORCH_CHECK_VALUE(x0.dim() >= 1, "x0 must be [N, ...], got a scalar");
  check_tensor(t, x0.sizes().slice(0, 1), at::kLong, "t");
  const auto wide = wide_type(x0.scalar_type());
  check_tensor(signal, {signal.numel()}, wide, "sqrt_alphas_cumprod");
  check_tensor(sigma, {signal.numel()}, wide, "sqrt_one_minus_alphas_cumprod");

  const auto format = layout_of(x0);
  const auto x = x0.contiguous(format), z = noise.contiguous(format);
  const auto steps = t.contiguous(), s = signal.contiguous(), e = sigma.contiguous();
  auto out = empty_like(x0, format);
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
