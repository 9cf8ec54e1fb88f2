// fastdiff::group_norm_silu and its backward on CPU tensors: checks, and how the work is divided.
// The arithmetic is in kernels/group_norm_silu.cpp and kernels/group_norm_silu_backward.cpp.
#include "cpu/kernels/group_norm_silu.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

#include "cpu/tensors.h"

namespace fastdiff {
namespace {

using Optional = std::optional<at::Tensor>;

constexpr int64_t kCacheLine = 64;         // bytes
constexpr int64_t kElements = kGrain / 4;  // of a thread at least; each takes an exponential

// Groups in a unit. Channels-first a group is contiguous and a unit of its own. Channels-last whole
// pixels are read and written fastest (measured: units of 256 bytes of each cost up to 2x), even if
// an image is read from a slower cache the second time. So a pixel is divided among units only
// where there are fewer images than threads, and then a unit has at least a few cache lines of it.
int64_t groups_in_unit(const at::Tensor& x, int64_t groups, bool channels_last) {
  if (!channels_last) return 1;
  const int64_t per_group = x.size(1) / groups * x.element_size(), lines = 4 * kCacheLine;
  const int64_t share = groups * x.size(0) / at::get_num_threads();
  return std::clamp<int64_t>(std::max(share, lines / per_group), 1, groups);
}

// The inputs made dense, kept alive beside the kernel's arguments.
struct Call {
  at::Tensor x;
  at::MemoryFormat format;
  std::vector<at::Tensor> held;
  GroupNormSilu args;

  Call(const at::Tensor& input, int64_t groups, const Optional& weight, const Optional& bias,
       double eps, const Optional& add, const Optional& scale, const Optional& shift, bool silu)
      : format(layout_of(input)) {
    check_floating(input, "x");
    TORCH_CHECK_VALUE(input.dim() >= 2, "x must be [N, C, ...], got ", input.sizes());
    const int64_t channels = input.size(1);
    TORCH_CHECK_VALUE(groups >= 1 && channels >= 1 && channels % groups == 0,
                      "num_groups must divide the channels: got ", groups, " groups for ", channels,
                      " channels");
    TORCH_CHECK_VALUE(eps >= 0, "eps must not be negative, got ", eps);
    const auto check = [&](const Optional& value, at::IntArrayRef sizes, const char* name) {
      if (value) check_tensor(*value, sizes, input.scalar_type(), name);
    };
    const auto per_image = input.sizes().slice(0, 2), per_channel = input.sizes().slice(1, 1);
    check(weight, per_channel, "weight");
    check(bias, per_channel, "bias");
    check(add, per_image, "add");
    check(scale, per_image, "scale");
    check(shift, per_image, "shift");
    x = input.contiguous(format);
    const int64_t pixels = x.numel() / std::max<int64_t>(1, x.size(0) * channels);
    const bool last = format != at::MemoryFormat::Contiguous;
    args = {.dtype = x.scalar_type(),
            .channels_last = last,
            .silu = silu,
            .channels = channels,
            .pixels = pixels,
            .groups = groups,
            .unit_groups = 1,
            .eps = eps,
            .x = x.const_data_ptr(),
            .weight = hold(weight),
            .bias = hold(bias),
            .add = hold(add),
            .scale = hold(scale),
            .shift = hold(shift)};
    if (x.numel() > 0) args.unit_groups = groups_in_unit(x, groups, last);
  }

  const void* hold(const Optional& value) {
    if (!value) return nullptr;
    held.push_back(value->contiguous());
    return held.back().const_data_ptr();
  }

  // Runs kernel(begin, end) over all units.
  template <class Kernel>
  void run(Kernel&& kernel) const {
    const int64_t units = (args.groups + args.unit_groups - 1) / args.unit_groups;
    const int64_t width = args.unit_groups * (args.channels / args.groups);
    at::parallel_for(0, x.size(0) * units, std::max<int64_t>(1, kElements / (width * args.pixels)),
                     kernel);
  }
};

at::Tensor statistics(const at::Tensor& x, int64_t groups) {
  return at::empty({x.size(0), groups}, x.options().dtype(at::kDouble));
}

// The concatenation of x and skip along the channels.
at::Tensor joined(const at::Tensor& x, const Optional& skip) {
  if (!skip) return x;
  check_floating(x, "x");
  TORCH_CHECK_VALUE(x.dim() >= 2, "x must be [N, C, ...], got ", x.sizes());
  auto sizes = x.sizes().vec();
  sizes[1] = skip->dim() == x.dim() ? skip->size(1) : -1;
  check_tensor(*skip, sizes, x.scalar_type(), "skip");
  const auto format = layout_of(x);
  return at::cat({x.contiguous(format), skip->contiguous(format)}, 1).contiguous(format);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> group_norm_silu_cpu(
    const at::Tensor& x, int64_t groups, const Optional& weight, const Optional& bias, double eps,
    const Optional& add, const Optional& scale, const Optional& shift, const Optional& residual,
    bool silu, const Optional& skip, const Optional& statistics_of_x) {
  const auto input = joined(x, skip);
  // The statistics are checked but not used. This kernel takes its own while the data is in cache.
  if (statistics_of_x) {
    TORCH_CHECK_VALUE(!skip, "statistics and skip cannot both be given");
    TORCH_CHECK_VALUE(x.dim() >= 2 && statistics_of_x->dim() == 4,
                      "statistics must have shape [N, S, 4, C], got ", statistics_of_x->sizes());
    check_tensor(*statistics_of_x, {x.size(0), statistics_of_x->size(1), 4, x.size(1)}, at::kFloat,
                 "statistics");
  }
  Call call(input, groups, weight, bias, eps, add, scale, shift, silu);
  if (residual) check_like(*residual, input, "residual");
  auto out = empty_like(input, call.format), mean = statistics(input, groups),
       rstd = statistics(input, groups);
  if (out.numel() == 0) return {out, mean.zero_(), rstd.zero_()};

  at::Tensor res;
  if (residual) call.args.residual = (res = residual->contiguous(call.format)).const_data_ptr();
  call.args.out = out.mutable_data_ptr();
  call.args.mean = mean.mutable_data_ptr<double>();
  call.args.rstd = rstd.mutable_data_ptr<double>();
  const auto kernel = FASTDIFF_KERNEL(group_norm_silu);
  call.run([&](int64_t begin, int64_t end) { kernel(call.args, begin, end); });
  return {out, mean, rstd};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
group_norm_silu_backward_cpu(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& mean,
                             const at::Tensor& rstd, int64_t groups, const Optional& weight,
                             const Optional& bias, const Optional& add, const Optional& scale,
                             const Optional& shift, bool silu, const Optional& skip) {
  const auto input = joined(x, skip);
  Call call(input, groups, weight, bias, 0, add, scale, shift, silu);
  check_like(grad, input, "grad");
  check_tensor(mean, {input.size(0), groups}, at::kDouble, "mean");
  check_tensor(rstd, {input.size(0), groups}, at::kDouble, "rstd");
  const auto wide = wide_type(input.scalar_type());
  const auto sums = [&] {
    return at::empty(input.sizes().slice(0, 2), input.options().dtype(wide));
  };
  auto dx = empty_like(input, call.format), sum_du = sums(), sum_du_h = sums(), sum_dx = sums();
  if (dx.numel() == 0) {
    for (auto* value : {&sum_du, &sum_du_h, &sum_dx}) value->zero_();
  } else {
    const auto g = grad.contiguous(call.format), m = mean.contiguous(), r = rstd.contiguous();
    call.args.mean = const_cast<double*>(m.const_data_ptr<double>());
    call.args.rstd = const_cast<double*>(r.const_data_ptr<double>());
    const GroupNormSiluBackward args{call.args,
                                     g.const_data_ptr(),
                                     dx.mutable_data_ptr(),
                                     sum_du.mutable_data_ptr(),
                                     sum_du_h.mutable_data_ptr(),
                                     sum_dx.mutable_data_ptr()};
    const auto kernel = FASTDIFF_KERNEL(group_norm_silu_backward);
    call.run([&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  }

  // value = (h w + b) (1 + scale) + shift, and du is its gradient.
  const auto type = input.scalar_type();
  auto dskip = at::empty({0}, input.options());
  if (skip) {  // outputs may not share memory
    dskip = dx.narrow(1, x.size(1), skip->size(1)).contiguous(call.format);
    dx = dx.narrow(1, 0, x.size(1)).contiguous(call.format);
  }
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
