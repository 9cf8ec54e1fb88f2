// fastdiff::q_sample and fastdiff::q_sample_from_seed on CPU tensors. The arithmetic is in
// kernels/q_sample.cpp.
#include "cpu/kernels/q_sample.h"

#include <torch/library.h>

#include "cpu/choose_pieces.h"
#include "cpu/philox_normal.h"
#include "cpu/timesteps.h"

namespace fastdiff {
namespace {

at::Tensor q_sample_cpu(const at::Tensor& x0, const at::Tensor& t, const at::Tensor& noise,
                        const at::Tensor& signal, const at::Tensor& sigma) {
  check_floating(x0, "x0");
  check_like(noise, x0, "noise");
  TORCH_CHECK_VALUE(x0.dim() >= 1, "x0 must be [N, ...], got a scalar");
  const auto wide = wide_type(x0.scalar_type());
  check_tensor(signal, {signal.numel()}, wide, "sqrt_alphas_cumprod");
  check_tensor(sigma, {signal.numel()}, wide, "sqrt_one_minus_alphas_cumprod");
  const auto steps = checked_timesteps(t, x0.size(0), signal.numel());

  const auto format = layout_of(x0);
  const auto x = x0.contiguous(format), z = noise.contiguous(format);
  const auto s = signal.contiguous(), e = sigma.contiguous();
  auto out = empty_like(x0, format);
  if (out.numel() == 0) return out;

  const QSampleArgs args{x0.scalar_type(),       x.numel() / x.size(0),
                         x.const_data_ptr(),     z.const_data_ptr(),
                         out.mutable_data_ptr(), steps.const_data_ptr<int64_t>(),
                         s.const_data_ptr(),     e.const_data_ptr()};
  const auto kernel = FASTDIFF_KERNEL(q_sample);
  at::parallel_for(0, out.numel(), kGrain,
                   [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  return out;
}

at::Tensor q_sample_from_seed_cpu(const at::Tensor& x0, const at::Tensor& t, const at::Tensor& seed,
                                  const at::Tensor& row, const at::Tensor& signal,
                                  const at::Tensor& sigma) {
  check_floating(x0, "x0");
  check_seed(seed, x0);
  const auto wide = wide_type(x0.scalar_type());
  check_tensor(signal, {signal.numel()}, wide, "sqrt_alphas_cumprod");
  check_tensor(sigma, {signal.numel()}, wide, "sqrt_one_minus_alphas_cumprod");
  const auto steps = checked_timesteps(t, x0.size(0), signal.numel());
  const uint32_t number = row_number(row);

  const auto format = layout_of(x0);
  const auto x = x0.contiguous(format), seeds = seed.contiguous();
  const auto s = signal.contiguous(), e = sigma.contiguous();
  auto out = empty_like(x0, format);
  const auto pieces = pieces_of(x, format);
  const QSampleFromSeedArgs args{x0.scalar_type(),
                                 pieces,
                                 x.const_data_ptr(),
                                 out.mutable_data_ptr(),
                                 seeds.const_data_ptr<int64_t>(),
                                 number,
                                 steps.const_data_ptr<int64_t>(),
                                 s.const_data_ptr(),
                                 e.const_data_ptr()};
  const auto kernel = FASTDIFF_KERNEL(q_sample_from_seed);
  at::parallel_for(0, x0.size(0) * pieces.count, grain_of(pieces, kHeavyGrain),
                   [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(fastdiff, CPU, m) {
  m.impl("q_sample", q_sample_cpu);
  m.impl("q_sample_from_seed", q_sample_from_seed_cpu);
}

}  // namespace fastdiff
