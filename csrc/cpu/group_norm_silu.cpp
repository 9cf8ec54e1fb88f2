// fastdiff::group_norm_silu and its backward on CPU tensors: checks, and how the work is divided.
// The arithmetic is in kernels/group_norm_silu.cpp and kernels/group_norm_silu_backward.cpp.
#include "cpu/kernels/group_norm_silu.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

#include "cpu/group_norm_units.h"
#include "cpu/tensors.h"

namespace fastdiff {
namespace {

using Optional = std::optional<at::Tensor>;

// The inputs, dense but for pixels that are apart, kept alive beside the kernel's arguments.
struct Call {
  at::MemoryFormat format;
  std::vector<int64_t> sizes;  // of the concatenation of x and skip
  std::vector<at::Tensor> held;
  GroupNormSilu args;

  Call(const at::Tensor& x, const Optional& skip, int64_t groups, const Optional& weight,
       const Optional& bias, double eps, const Optional& add, const Optional& scale,
       const Optional& shift, bool silu)
      : format(layout_of(x)), sizes(x.sizes().vec()) {
    check_floating(x, "x");
    TORCH_CHECK_VALUE(x.dim() >= 2, "x must be [N, C, ...], got ", x.sizes());
    if (skip) {
      auto like_x = sizes;
      like_x[1] = skip->dim() == x.dim() ? skip->size(1) : -1;
      check_tensor(*skip, like_x, x.scalar_type(), "skip");
      sizes[1] += skip->size(1);
    }
    const int64_t channels = sizes[1];
    TORCH_CHECK_VALUE(groups >= 1 && channels >= 1 && channels % groups == 0,
                      "num_groups must divide the channels: got ", groups, " groups for ", channels,
                      " channels");
    TORCH_CHECK_VALUE(eps >= 0, "eps must not be negative, got ", eps);
    const auto check = [&](const Optional& value, at::IntArrayRef wanted, const char* name) {
      if (value) check_tensor(*value, wanted, x.scalar_type(), name);
    };
    const at::IntArrayRef all(sizes), per_image = all.slice(0, 2), per_channel = all.slice(1, 1);
    check(weight, per_channel, "weight");
    check(bias, per_channel, "bias");
    check(add, per_image, "add");
    check(scale, per_image, "scale");
    check(shift, per_image, "shift");
    const int64_t total = c10::multiply_integers(sizes);
    args = {.dtype = x.scalar_type(),
            .channels_last = format != at::MemoryFormat::Contiguous,
            .silu = silu,
            .channels = channels,
            .pixels = total / std::max<int64_t>(1, x.size(0) * channels),
            .groups = groups,
            .unit_groups = 1,
            .eps = eps,
            .weight = hold(weight),
            .bias = hold(bias),
            .add = hold(add),
            .scale = hold(scale),
            .shift = hold(shift)};
    args.x = input(x);
    if (skip) args.skip = input(*skip);
    if (total > 0) args.unit_groups = groups_in_unit(args, x.size(0));
  }

  // A tensor of x's layout, for reading.
  NormTensor input(const at::Tensor& value) {
    NormTensor out{.channels = value.size(1), .ld = value.size(1)};
    held.push_back(format == at::MemoryFormat::ChannelsLast ? by_pixel(value, &out.ld)
                                                            : value.contiguous(format));
    out.data = const_cast<void*>(held.back().const_data_ptr());
    return out;
  }

  // A dense tensor of x's layout, for writing.
  NormTensor output(const at::Tensor& value) const {
    return {value.mutable_data_ptr(), value.size(1), value.size(1)};
  }

  bool empty() const { return c10::multiply_integers(sizes) == 0; }

  at::Tensor empty_of(at::IntArrayRef shape, const at::Tensor& x) const {
    return at::empty(shape, x.options(), format);
  }

  const void* hold(const Optional& value) {
    if (!value) return nullptr;
    held.push_back(value->contiguous());
    return held.back().const_data_ptr();
  }
};

at::Tensor statistics(const at::Tensor& x, int64_t groups) {
  return at::empty({x.size(0), groups}, x.options().dtype(at::kDouble));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> group_norm_silu_cpu(
    const at::Tensor& x, int64_t groups, const Optional& weight, const Optional& bias, double eps,
    const Optional& add, const Optional& scale, const Optional& shift, const Optional& residual,
    bool silu, const Optional& skip, const Optional& statistics_of_x) {
  // The statistics are checked but not used. This kernel takes its own while the data is in cache.
  if (statistics_of_x) {
    TORCH_CHECK_VALUE(!skip, "statistics and skip cannot both be given");
    TORCH_CHECK_VALUE(x.dim() >= 2 && statistics_of_x->dim() == 4,
                      "statistics must have shape [N, S, 4, C], got ", statistics_of_x->sizes());
    check_tensor(*statistics_of_x, {x.size(0), statistics_of_x->size(1), 4, x.size(1)}, at::kFloat,
                 "statistics");
  }
  // Channels-first the statistics are of whole groups, which may lie in both tensors.
  const bool joined = skip && layout_of(x) == at::MemoryFormat::Contiguous;
  Call call(x, skip, groups, weight, bias, eps, add, scale, shift, silu);
  if (joined) {
    call.args.x = call.input(at::cat({x, *skip}, 1));
    call.args.skip = {};
  }
  if (residual) check_tensor(*residual, call.sizes, x.scalar_type(), "residual");
  auto out = call.empty_of(call.sizes, x), mean = statistics(x, groups),
       rstd = statistics(x, groups);
  if (call.empty()) return {out, mean.zero_(), rstd.zero_()};

  at::Tensor res;
  if (residual) call.args.residual = (res = residual->contiguous(call.format)).const_data_ptr();
  call.args.out = out.mutable_data_ptr();
  call.args.mean = mean.mutable_data_ptr<double>();
  call.args.rstd = rstd.mutable_data_ptr<double>();
  const auto kernel = FASTDIFF_KERNEL(group_norm_silu);
  for_units(call.args, x.size(0),
            [&](int64_t begin, int64_t end) { kernel(call.args, begin, end); });
  return {out, mean, rstd};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
group_norm_silu_backward_cpu(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& mean,
                             const at::Tensor& rstd, int64_t groups, const Optional& weight,
                             const Optional& bias, const Optional& add, const Optional& scale,
                             const Optional& shift, bool silu, const Optional& skip) {
  Call call(x, skip, groups, weight, bias, 0, add, scale, shift, silu);
  check_tensor(grad, call.sizes, x.scalar_type(), "grad");
  check_tensor(mean, {x.size(0), groups}, at::kDouble, "mean");
  check_tensor(rstd, {x.size(0), groups}, at::kDouble, "rstd");
  const auto type = x.scalar_type(), wide = wide_type(type);
  const auto sums = [&] {
    return at::empty({x.size(0), call.args.channels}, x.options().dtype(wide));
  };
  auto dx = call.empty_of(x.sizes(), x), sum_du = sums(), sum_du_h = sums(), sum_dx = sums();
  auto dskip = skip ? call.empty_of(skip->sizes(), x) : at::empty({0}, x.options());
  if (call.empty()) {
    for (auto* value : {&sum_du, &sum_du_h, &sum_dx}) value->zero_();
  } else {
    const auto m = mean.contiguous(), r = rstd.contiguous();
    call.args.mean = const_cast<double*>(m.const_data_ptr<double>());
    call.args.rstd = const_cast<double*>(r.const_data_ptr<double>());
    const GroupNormSiluBackward args{call.args,
                                     call.input(grad),
                                     call.output(dx),
                                     skip ? call.output(dskip) : NormTensor{},
                                     sum_du.mutable_data_ptr(),
                                     sum_du_h.mutable_data_ptr(),
                                     sum_dx.mutable_data_ptr()};
    const auto kernel = FASTDIFF_KERNEL(group_norm_silu_backward);
    for_units(call.args, x.size(0), [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  }

  // value = (h w + b) (1 + scale) + shift, and du is its gradient.
  auto dshift = sum_du, dscale = sum_du_h;
  if (weight) dscale = dscale.mul(*weight);
  if (bias) dscale = dscale.addcmul(sum_du, bias->to(wide));
  if (scale) {
    const auto grow = scale->to(wide).add(1);
    sum_du = sum_du.mul(grow);
    sum_du_h = sum_du_h.mul(grow);
  }
  return {dx,
          dskip,
          sum_du_h.sum(0).to(type),
          sum_du.sum(0).to(type),
          sum_dx.to(type),
          dscale.to(type),
          dshift.to(type)};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastdiff, CPU, m) {
  m.impl("group_norm_silu", group_norm_silu_cpu);
  m.impl("group_norm_silu_backward", group_norm_silu_backward_cpu);
}

}  // namespace fastdiff
