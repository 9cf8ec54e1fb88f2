// fastdiff::sampler_step on CPU tensors; the arithmetic is in kernels/sampler_step.cpp.
#include "cpu/kernels/sampler_step.h"

#include <torch/library.h>

#include "cpu/tensors.h"

namespace fastdiff {
namespace {

at::Tensor sampler_step_cpu(const at::Tensor& x, const at::Tensor& model_out,
                            const std::optional<at::Tensor>& noise, const at::Tensor& table,
                            const at::Tensor& step) {
  check_floating(x, "x");
  const auto type = x.scalar_type();
  TORCH_CHECK_VALUE(x.dim() >= 2 && model_out.dim() == x.dim(),
                    "x and model_out must be [N, C, ...]", ", got ", x.sizes(), " and ",
                    model_out.sizes());
  const bool learned = model_out.size(1) == 2 * x.size(1) && x.size(1) > 0;
  auto wanted = x.sizes().vec();
  if (learned) wanted[1] *= 2;
  TORCH_CHECK_VALUE(model_out.sizes() == at::IntArrayRef(wanted),
                    "model_out must have the shape of x, ", x.sizes(),
                    ", or twice its channels, got ", model_out.sizes());
  TORCH_CHECK_TYPE(model_out.scalar_type() == type, "model_out must be ", type, ", got ",
                   model_out.scalar_type());
  TORCH_CHECK_VALUE(
      model_out.device().is_cpu() && table.device().is_cpu() && step.device().is_cpu(),
      "model_out, table and step must be on the CPU");
  if (noise) check_like(*noise, x, "noise");
  TORCH_CHECK_VALUE(table.dim() == 2 && table.size(1) == kRow, "table must have shape [S, ", kRow,
                    "], got ", table.sizes());
  TORCH_CHECK_TYPE(table.scalar_type() == wide_type(type), "table must be ", wide_type(type),
                   ", got ", table.scalar_type());
  TORCH_CHECK_TYPE(step.scalar_type() == at::kLong && step.numel() == 1,
                   "step must be an int64 tensor of one element");
  const int64_t index = *step.const_data_ptr<int64_t>();
  TORCH_CHECK_INDEX(index >= 0 && index < table.size(0), "step must lie in 0..", table.size(0) - 1,
                    ", got ", index);

  const auto format = layout_of(x);
  const auto a = x.contiguous(format), m = model_out.contiguous(format);
  const auto z = noise ? noise->contiguous(format) : at::Tensor();
  const auto rows = table.contiguous();
  auto out = empty_like(x, format);
  if (out.numel() == 0) return out;

  // What lies together in x and in model_out: everything, or with variance channels an image's
  // channels (channels-first) or a pixel's (channels-last).
  int64_t length = x.numel(), stride = 0;
  if (learned) {
    length = format == at::MemoryFormat::Contiguous ? x.numel() / x.size(0) : x.size(1);
    stride = 2 * length;
  }
  const auto* row =
      static_cast<const char*>(rows.const_data_ptr()) + index * kRow * rows.element_size();
  const SamplerStepArgs args{type,
                             length,
                             stride,
                             learned,
                             row,
                             a.const_data_ptr(),
                             m.const_data_ptr(),
                             noise ? z.const_data_ptr() : nullptr,
                             out.mutable_data_ptr()};
  const auto kernel = FASTDIFF_KERNEL(sampler_step);
  at::parallel_for(0, out.numel(), kGrain,
                   [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(fastdiff, CPU, m) { m.impl("sampler_step", sampler_step_cpu); }

}  // namespace fastdiff
