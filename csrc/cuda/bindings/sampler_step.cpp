// sampler_step on CUDA tensors.
#include "cuda/sampler_step.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/ops/empty_strided.h>

#include "cuda/bindings/common.h"

namespace fastdiff::cuda {
namespace {

void sampler_step(const at::Tensor& x, const at::Tensor& model_out, const Optional& history,
                  const Optional& noise, const at::Tensor& table, const at::Tensor& step,
                  const Optional& seed, const at::Tensor& out) {
  const Images shape(x, "x");
  TORCH_CHECK_VALUE(model_out.dim() == x.dim(), "x and model_out must be [N, C, ...], got ",
                    x.sizes(), " and ", model_out.sizes());
  const bool guided = model_out.size(0) == 2 * x.size(0) && x.size(0) > 0;
  const bool has_variance = model_out.size(1) == 2 * x.size(1) && x.size(1) > 0;
  c10::DimVector wanted(x.sizes());
  if (guided) wanted[0] *= 2;
  if (has_variance) wanted[1] *= 2;
  check_tensor(model_out, wanted, x.scalar_type(), x.device(),
               "model_out (like x, or of twice its images or channels)");
  check_like(out, x, "out");
  if (noise) check_like(*noise, x, "noise");
  int64_t depth = 0;
  if (history) {
    TORCH_CHECK_VALUE(history->dim() == x.dim() + 1 && history->size(0) <= kSamplerDepth,
                      "history must be [K, N, C, ...] with K <= ", kSamplerDepth, ", got ",
                      history->sizes());
    depth = history->size(0);
    c10::DimVector sizes{depth};
    sizes.append(x.sizes().begin(), x.sizes().end());
    check_tensor(*history, sizes, at::kFloat, x.device(), "history");
  }
  TORCH_CHECK_VALUE(table.dim() == 2, "table must be [R, ", static_cast<int>(kSamplerColumns),
                    " + K], got ", table.sizes());
  check_tensor(table, {table.size(0), kSamplerColumns + depth}, at::kFloat, x.device(), "table");
  check_scalar(step, at::kLong, x, "step");
  if (seed) {
    TORCH_CHECK_VALUE(!noise, "noise and seed cannot both be given");
    check_seed(*seed, x);
  }
  if (history) {
    for (const auto* other : {&x, &model_out, &out, &table})
      TORCH_CHECK_VALUE(!overlap(*history, *other), "history must not overlap another tensor");
    TORCH_CHECK_VALUE(!noise || !overlap(*history, *noise),
                      "history must not overlap another tensor");
    TORCH_CHECK_VALUE(at::has_internal_overlap(*history) != at::MemOverlap::Yes,
                      "history must not overlap itself");
  }
  TORCH_CHECK_VALUE(at::has_internal_overlap(out) != at::MemOverlap::Yes,
                    "out must not overlap itself");
  TORCH_CHECK_VALUE(shape.channels * shape.pixels < int64_t{1} << 32,
                    "an image must have less than 2^32 elements, got ", x.sizes());
  if (x.numel() == 0) return;

  const OnDevice on(x);
  const auto a = x.contiguous(shape.format), m = model_out.contiguous(shape.format);
  const auto z = noise ? noise->contiguous(shape.format) : at::Tensor();
  at::Tensor slots;
  if (depth > 0) {
    slots = *history;
    if (!slots_like(slots, a)) {
      c10::DimVector strides{a.numel()};
      strides.append(a.strides().begin(), a.strides().end());
      slots = at::empty_strided(history->sizes(), strides, history->options()).copy_(*history);
    }
  }
  // An output may share memory with an input only if each element has the same address in both.
  const auto spoils = [&](const at::Tensor& read) {
    return read.defined() && read.const_data_ptr() != out.const_data_ptr() && overlap(out, read);
  };
  const bool direct = out.is_contiguous(shape.format) && !spoils(a) && !spoils(m) && !spoils(z) &&
                      !spoils(table) && !(has_variance && overlap(out, m));
  const auto result = direct ? out : empty(x.sizes(), x, shape.format);

  Held held;
  SamplerStepArgs args{.dtype = shape.dtype,
                       .images = shape.images,
                       .channels = shape.channels,
                       .pixels = shape.pixels,
                       .channels_last = shape.channels_last,
                       .guided = guided,
                       .has_variance = has_variance,
                       .x = a.const_data_ptr(),
                       .model_out = m.const_data_ptr(),
                       .noise = z.defined() ? z.const_data_ptr() : nullptr,
                       .seed = held.as<int64_t>(seed),
                       .out = result.mutable_data_ptr(),
                       .table = table.const_data_ptr<float>(),
                       .rows = table.size(0),
                       .row_stride = table.stride(0),
                       .column_stride = table.stride(1),
                       .step = step.const_data_ptr<int64_t>(),
                       .history = slots.defined() ? slots.mutable_data_ptr<float>() : nullptr,
                       .depth = static_cast<int>(depth),
                       .slot_stride = slots.defined() ? slots.stride(0) : 0,
                       .workspace = nullptr};
  const auto workspace = workspace_for(sampler_step_workspace(args), x);
  args.workspace = workspace.mutable_data_ptr();
  sampler_step_cuda(args, on.stream);
  if (!direct) out.copy_(result);
  bump_version(out);
  if (slots.defined()) {
    if (!slots.is_same(*history)) history->copy_(slots);
    bump_version(*history);
  }
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(FASTDIFF_NAMESPACE, m) {
  m.def(
      "sampler_step(Tensor x, Tensor model_out, Tensor(a!)? history, Tensor? noise, "
      "Tensor table, Tensor step, Tensor? seed, Tensor(b!) out) -> ()");
}

TORCH_LIBRARY_IMPL(FASTDIFF_NAMESPACE, FASTDIFF_KEY, m) { m.impl("sampler_step", sampler_step); }

}  // namespace fastdiff::cuda
