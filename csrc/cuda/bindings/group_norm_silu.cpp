// group_norm_silu and its backward on CUDA tensors.
#include "cuda/group_norm_silu.h"

#include "cuda/bindings/common.h"
#include "cuda/group_norm_silu_backward.h"

namespace fastdiff::cuda {
namespace {

// The checks of both forward and backward, and the shape of y.
struct GroupNorm : Images {
  c10::DimVector sizes;  // of cat(x, skip)
  int64_t skip_channels = 0;

  GroupNorm(const at::Tensor& x, int64_t groups, const Optional& weight, const Optional& bias,
            const Optional& add, const Optional& scale, const Optional& shift, const Optional& skip)
      : Images(x, "x"), sizes(x.sizes()) {
    if (skip) {
      skip_channels = skip->dim() == x.dim() ? skip->size(1) : 0;
      sizes[1] = skip_channels;
      check_tensor(*skip, sizes, x.scalar_type(), x.device(), "skip");
      sizes[1] = channels + skip_channels;
      pixels = c10::multiply_integers(sizes.begin() + 2, sizes.end());  // x may have no channels
    }
    TORCH_CHECK_VALUE(groups >= 1 && sizes[1] >= 1 && sizes[1] % groups == 0,
                      "num_groups must divide the channels: got ", groups, " groups for ", sizes[1],
                      " channels");
    const at::IntArrayRef all(sizes);
    check_optional(weight, all.slice(1, 1), x, "weight");
    check_optional(bias, all.slice(1, 1), x, "bias");
    check_optional(add, all.slice(0, 2), x, "add");
    check_optional(scale, all.slice(0, 2), x, "scale");
    check_optional(shift, all.slice(0, 2), x, "shift");
  }
};

std::tuple<at::Tensor, at::Tensor, at::Tensor> group_norm_silu(
    const at::Tensor& x, int64_t groups, const Optional& weight, const Optional& bias, double eps,
    const Optional& add, const Optional& scale, const Optional& shift, const Optional& residual,
    bool silu, const Optional& skip, const Optional& statistics) {
  const GroupNorm shape(x, groups, weight, bias, add, scale, shift, skip);
  TORCH_CHECK_VALUE(eps >= 0, "eps must not be negative, got ", eps);
  check_optional(residual, shape.sizes, x, "residual");
  if (statistics) {
    TORCH_CHECK_VALUE(!skip, "statistics and skip cannot both be given");
    TORCH_CHECK_VALUE(statistics->dim() == 4 && statistics->size(1) >= 1,
                      "statistics must be [N, S, 4, C], got ", statistics->sizes());
    check_tensor(*statistics, {shape.images, statistics->size(1), 4, shape.channels}, at::kFloat,
                 x.device(), "statistics");
  }
  const OnDevice on(x);
  auto y = empty(shape.sizes, x, shape.format);
  const auto wide = x.options().dtype(at::kDouble);
  auto mean = at::empty({shape.images, groups}, wide),
       rstd = at::empty({shape.images, groups}, wide);
  if (y.numel() == 0) return {y, mean.zero_(), rstd.zero_()};

  Held held;
  GroupNormSiluArgs args{.dtype = shape.dtype,
                         .channels_last = shape.channels_last,
                         .silu = silu,
                         .images = shape.images,
                         .channels = shape.channels,
                         .skip_channels = shape.skip_channels,
                         .pixels = shape.pixels,
                         .groups = groups,
                         .eps = eps,
                         .x = held(x, shape.format),
                         .skip = held(skip, shape.format),
                         .weight = held(weight),
                         .bias = held(bias),
                         .add = held(add),
                         .scale = held(scale),
                         .shift = held(shift),
                         .residual = held(residual, shape.format),
                         .statistics = static_cast<const float*>(held(statistics)),
                         .spans = statistics ? statistics->size(1) : 0,
                         .workspace = nullptr,
                         .y = y.mutable_data_ptr(),
                         .mean = mean.mutable_data_ptr<double>(),
                         .rstd = rstd.mutable_data_ptr<double>()};
  const auto workspace = workspace_for(group_norm_silu_workspace(args), x);
  args.workspace = workspace.mutable_data_ptr();
  group_norm_silu_cuda(args, on.stream);
  return {y, mean, rstd};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
group_norm_silu_backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& mean,
                         const at::Tensor& rstd, int64_t groups, const Optional& weight,
                         const Optional& bias, const Optional& add, const Optional& scale,
                         const Optional& shift, bool silu, const Optional& skip) {
  const GroupNorm shape(x, groups, weight, bias, add, scale, shift, skip);
  check_tensor(grad, shape.sizes, x.scalar_type(), x.device(), "grad");
  for (const auto& [value, name] : {std::pair(&mean, "mean"), std::pair(&rstd, "rstd")})
    check_tensor(*value, {shape.images, groups}, at::kDouble, x.device(), name);
  const OnDevice on(x);
  const int64_t channels = shape.sizes[1];
  auto dx = empty(x.sizes(), x, shape.format);
  auto dskip = skip ? empty(skip->sizes(), x, shape.format) : empty({0}, x);
  auto dweight = empty({channels}, x), dbias = empty({channels}, x);
  auto dadd = empty({shape.images, channels}, x), dscale = empty({shape.images, channels}, x),
       dshift = empty({shape.images, channels}, x);
  if (grad.numel() == 0) {
    for (auto* value : {&dweight, &dbias, &dadd, &dscale, &dshift}) value->zero_();
    return {dx, dskip, dweight, dbias, dadd, dscale, dshift};
  }
  Held held;
  GroupNormSiluBackwardArgs args{.dtype = shape.dtype,
                                 .channels_last = shape.channels_last,
                                 .silu = silu,
                                 .images = shape.images,
                                 .channels = shape.channels,
                                 .skip_channels = shape.skip_channels,
                                 .pixels = shape.pixels,
                                 .groups = groups,
                                 .grad = held(grad, shape.format),
                                 .x = held(x, shape.format),
                                 .skip = held(skip, shape.format),
                                 .mean = held.as<double>(mean),
                                 .rstd = held.as<double>(rstd),
                                 .weight = held(weight),
                                 .bias = held(bias),
                                 .add = held(add),
                                 .scale = held(scale),
                                 .shift = held(shift),
                                 .workspace = nullptr,
                                 .dx = dx.mutable_data_ptr(),
                                 .dskip = skip ? dskip.mutable_data_ptr() : nullptr,
                                 .dweight = dweight.mutable_data_ptr(),
                                 .dbias = dbias.mutable_data_ptr(),
                                 .dadd = dadd.mutable_data_ptr(),
                                 .dscale = dscale.mutable_data_ptr(),
                                 .dshift = dshift.mutable_data_ptr()};
  const auto workspace = workspace_for(group_norm_silu_backward_workspace(args), x);
  args.workspace = workspace.mutable_data_ptr();
  group_norm_silu_backward_cuda(args, on.stream);
  return {dx, dskip, dweight, dbias, dadd, dscale, dshift};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(FASTDIFF_NAMESPACE, m) {
  m.def(
      "group_norm_silu(Tensor x, int num_groups, Tensor? weight, Tensor? bias, float eps, "
      "Tensor? add, Tensor? scale, Tensor? shift, Tensor? residual, bool silu, "
      "Tensor? skip=None, Tensor? statistics=None) -> (Tensor, Tensor, Tensor)");
  m.def(
      "group_norm_silu_backward(Tensor grad, Tensor x, Tensor mean, Tensor rstd, int num_groups, "
      "Tensor? weight, Tensor? bias, Tensor? add, Tensor? scale, Tensor? shift, bool silu, "
      "Tensor? skip=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(FASTDIFF_NAMESPACE, FASTDIFF_KEY, m) {
  m.impl("group_norm_silu", group_norm_silu);
  m.impl("group_norm_silu_backward", group_norm_silu_backward);
}

}  // namespace fastdiff::cuda
