// fastdiff::norm_backward on CPU tensors: checks, and the sums over the images. The arithmetic of
// the pixels is that of group_norm_silu_backward, in kernels/group_norm_silu_backward.cpp.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "cpu/group_norm_units.h"
#include "cpu/group_statistics.h"
#include "cpu/kernels/group_norm_silu.h"
#include "cpu/tensors.h"

namespace fastdiff {
namespace {

using at::Tensor;
using Optional = std::optional<Tensor>;

// Of the parameters; empty for those that are not given.
struct ParameterGradients {
  Tensor weight, bias, scale, shift;
};

struct Backward {
  const Tensor& x;
  const Optional &skip, &weight, &bias, &scale, &shift;
  bool norm;
  GroupNormSiluBackward args{};
  std::vector<Tensor> held;  // what the arguments point to

  Backward(const Tensor& grad, const Tensor& x, at::TensorList statistics, int64_t groups,
           const Optional& weight, const Optional& bias, double eps, const Optional& scale,
           const Optional& shift, bool silu, const Optional& skip)
      : x(x),
        skip(skip),
        weight(weight),
        bias(bias),
        scale(scale),
        shift(shift),
        norm(groups != 0) {
    check_floating(x, "x");
    TORCH_CHECK_VALUE(x.dim() == 4, "x must be [N, C, H, W], got ", x.sizes());
    const int64_t n = x.size(0), h = x.size(2), w = x.size(3);
    int64_t channels = x.size(1);
    if (skip) {
      TORCH_CHECK_VALUE(skip->dim() == 4, "skip must be [N, C, H, W], got ", skip->sizes());
      check_tensor(*skip, {n, skip->size(1), h, w}, x.scalar_type(), "skip");
      channels += skip->size(1);
    }
    check_tensor(grad, {n, channels, h, w}, x.scalar_type(), "grad");
    auto& forward = args.forward;
    forward = {.dtype = x.scalar_type(),
               .channels_last = true,
               .silu = silu,
               .wide_parameters = true,
               .channels = channels,
               .pixels = h * w,
               .groups = norm ? groups : 1,
               .unit_groups = 1,
               .eps = eps};
    forward.x = input(x);
    if (skip) forward.skip = input(*skip);
    args.grad = input(grad);
    if (!norm) {
      TORCH_CHECK_VALUE(silu && statistics.empty() && !weight && !bias && !scale && !shift,
                        "without groups there is a SiLU and nothing else, neither statistics nor "
                        "weight, bias, scale or shift");
      return;
    }
    GroupStatistics joined(statistics, groups, eps);
    TORCH_CHECK_VALUE(joined.images() == n && joined.channels() == channels, "statistics of ",
                      joined.images(), " images and ", joined.channels(),
                      " channels do not fit an input of ", n, " and ", channels);
    forward.weight = parameter(weight, {channels}, "weight");
    forward.bias = parameter(bias, {channels}, "bias");
    forward.scale = parameter(scale, {n, channels}, "scale");
    forward.shift = parameter(shift, {n, channels}, "shift");
    if (grad.numel() == 0) return;
    forward.unit_groups = groups_in_unit(forward, n);
    forward.mean = hold(at::empty({2, n, groups}, joined.options())).mutable_data_ptr<double>();
    forward.rstd = forward.mean + n * groups;
    int64_t group = 0;
    for (int64_t image = 0; image < n; ++image)
      joined.for_groups(image, [&](int64_t, int64_t, double mean, double rstd) {
        forward.mean[group] = mean;
        forward.rstd[group++] = rstd;
      });
    const auto wide = x.options().dtype(wide_type(forward.dtype));
    args.sum_du = hold(at::empty({n, channels}, wide)).mutable_data_ptr();
    args.sum_du_h = hold(at::empty({n, channels}, wide)).mutable_data_ptr();
  }

  ParameterGradients run(const NormTensor& dx, const NormTensor& dskip) {
    args.dx = dx;
    args.dskip = dskip;
    const int64_t n = x.size(0);
    const auto& forward = args.forward;
    const bool empty = n * forward.channels * forward.pixels == 0;
    if (!norm) {
      const auto kernel = FASTDIFF_KERNEL(silu_backward);
      if (!empty) for_units(forward, n, [&](int64_t i, int64_t end) { kernel(args, i, end); });
      return sums<float>(0);
    }
    const auto kernel = FASTDIFF_KERNEL(group_norm_silu_backward);
    if (!empty) for_units(forward, n, [&](int64_t i, int64_t end) { kernel(args, i, end); });
    const int64_t images = empty ? 0 : n;
    return forward.dtype == at::kDouble ? sums<double>(images) : sums<float>(images);
  }

 private:
  const Tensor& hold(Tensor value) {
    held.push_back(std::move(value));
    return held.back();
  }

  NormTensor input(const Tensor& value) {
    NormTensor out{.channels = value.size(1)};
    out.data = const_cast<void*>(hold(by_pixel(value, &out.ld)).const_data_ptr());
    return out;
  }

  // A coefficient [C], or [N or 1, C] as [N, C], in the wide type.
  const void* parameter(const Optional& value, at::IntArrayRef sizes, const char* name) {
    if (!value) return nullptr;
    const auto type = value->scalar_type(), wide = wide_type(x.scalar_type());
    check_device(*value, at::kCPU, name);
    TORCH_CHECK_TYPE(type == x.scalar_type() || type == wide, name, " must be ", wide,
                     " or of the dtype of x, ", x.scalar_type(), ", got ", type);
    const bool fits =
        value->sizes() == sizes || (sizes.size() == 2 && value->dim() == 2 && value->size(0) == 1 &&
                                    value->size(1) == sizes[1]);
    TORCH_CHECK_VALUE(fits, name, " must have shape ", sizes, ", got ", value->sizes());
    return hold(value->expand(sizes).to(wide).contiguous()).const_data_ptr();
  }

  // value = (h w + b) (1 + scale) + shift, and du is its gradient: the sums of it and of du h over
  // the pixels become those over the images.
  template <class Wide>
  ParameterGradients sums(int64_t images) const {
    const auto of = [](const void* from) { return static_cast<const Wide*>(from); };
    const auto& f = args.forward;
    const Wide *w = of(f.weight), *b = of(f.bias), *grow = of(f.scale);
    const Wide *du = of(args.sum_du), *du_h = of(args.sum_du_h);
    const auto zeros = [&](const Optional& value) {
      return value ? at::zeros(value->sizes(), x.options().dtype(at::kDouble)) : Tensor();
    };
    const auto start = [](const Tensor& sum) {
      return sum.defined() ? sum.mutable_data_ptr<double>() : nullptr;
    };
    const Tensor dweight = zeros(weight), dbias = zeros(bias), dscale = zeros(scale),
                 dshift = zeros(shift);
    double *for_weight = start(dweight), *for_bias = start(dbias), *for_scale = start(dscale),
           *for_shift = start(dshift);
    const bool scale_each = scale && scale->size(0) > 1, shift_each = shift && shift->size(0) > 1;
    for (int64_t image = 0; image < images; ++image) {
      for (int64_t c = 0; c < f.channels; ++c, ++du, ++du_h) {
        const double factor = grow ? 1. + *grow++ : 1.;
        if (for_weight) for_weight[c] += *du_h * factor;
        if (for_bias) for_bias[c] += *du * factor;
        if (for_scale) for_scale[c] += *du_h * (w ? w[c] : 1.) + *du * (b ? b[c] : 0.);
        if (for_shift) for_shift[c] += *du;
      }
      if (scale_each) for_scale += f.channels;
      if (shift_each) for_shift += f.channels;
    }
    const auto rounded = [&](const Tensor& sum, const Optional& value) {
      return value ? sum.to(value->scalar_type()) : at::empty({0}, x.options());
    };
    return {rounded(dweight, weight), rounded(dbias, bias), rounded(dscale, scale),
            rounded(dshift, shift)};
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> norm_backward_cpu(
    const Tensor& grad, const Tensor& x, at::TensorList statistics, int64_t groups,
    const Optional& weight, const Optional& bias, double eps, const Optional& scale,
    const Optional& shift, bool silu, const Optional& skip) {
  Backward call(grad, x, statistics, groups, weight, bias, eps, scale, shift, silu, skip);
  const auto like = [&](const Tensor& value) {
    return at::empty(value.sizes(), value.options(), at::MemoryFormat::ChannelsLast);
  };
  const auto dense = [](const Tensor& value) {
    return NormTensor{value.mutable_data_ptr(), value.size(1), value.size(1)};
  };
  auto dx = like(x), dskip = skip ? like(*skip) : at::empty({0}, x.options());
  auto of = call.run(dense(dx), skip ? dense(dskip) : NormTensor{});
  return {dx, dskip, of.weight, of.bias, of.scale, of.shift};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> norm_backward_in_place_cpu(
    const Tensor& grad, const Tensor& x, at::TensorList statistics, int64_t groups,
    const Optional& weight, const Optional& bias, double eps, const Optional& scale,
    const Optional& shift, bool silu, const Optional& skip) {
  auto* first = static_cast<char*>(grad.mutable_data_ptr());
  Backward call(grad, x, statistics, groups, weight, bias, eps, scale, shift, silu, skip);
  const NormTensor& whole = call.args.grad;
  TORCH_CHECK_VALUE(grad.numel() == 0 || whole.data == first,
                    "a grad to write to must be channels-last, got strides ", grad.strides());
  TORCH_CHECK_VALUE(!overlap(grad, x) && !(skip && overlap(grad, *skip)),
                    "a grad to write to must not share memory with x or skip");
  const int64_t channels = x.size(1);
  auto of = call.run({first, channels, whole.ld},
                     {first + channels * grad.element_size(), whole.channels - channels, whole.ld});
  bump_version(grad);
  return {of.weight, of.bias, of.scale, of.shift};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastdiff, CPU, m) {
  m.impl("norm_backward", norm_backward_cpu);
  m.impl("norm_backward_in_place", norm_backward_in_place_cpu);
}

}  // namespace fastdiff
