#include "cpu/kernels/conv2d.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "cpu/parallel.h"
#include "cpu/tensors.h"

namespace fastdiff {
namespace {

using Optional = std::optional<at::Tensor>;

// Sides of kernels, strides and paddings, and channels, beyond which fastdiff/ops/conv2d.py takes
// the reference: no size that is computed from them can overflow.
constexpr int64_t kLargest = 64, kMostChannels = int64_t{1} << 20;
// As there: filters of a gated convolution and channels of a Strassen one come in multiples of
// these, and algorithms have these numbers.
constexpr int64_t kGated = 256, kHalves = 32;
enum Algorithm : int64_t { kDirect, kWinograd2, kWinograd4, kStrassen, kPhases4, kAlgorithms };

Threads threads() {
  return {at::in_parallel_region() ? 1 : at::get_num_threads(),
          [](int64_t units, Threads::Body body, void* context) {
            for_each_unit(units, [&](int64_t begin, int64_t end) { body(context, begin, end); });
          }};
}

void check_algorithm(int64_t algorithm, at::IntArrayRef weight, at::IntArrayRef stride) {
  TORCH_CHECK_VALUE(algorithm >= 0 && algorithm < kAlgorithms, "unknown algorithm ", algorithm);
  const bool plain = weight[2] == 3 && weight[3] == 3 && stride[0] == 1 && stride[1] == 1;
  TORCH_CHECK_VALUE(algorithm == kDirect || algorithm == kStrassen || plain,
                    "Winograd is for 3x3 kernels and stride 1, got a weight of ", weight,
                    " and stride ", stride);
  const bool halves = weight[2] == 1 && weight[3] == 1 && weight[1] % kHalves == 0;
  TORCH_CHECK_VALUE(algorithm != kStrassen || halves,
                    "Strassen is for 1x1 kernels and channels in multiples of ", kHalves,
                    ", got a weight of ", weight);
}

void check_weight_size(at::IntArrayRef size) {
  TORCH_CHECK_VALUE(size.size() == 4, "a weight must have sizes K, C, R, S, got ", size);
  for (int d = 0; d < 4; ++d)
    TORCH_CHECK_VALUE(size[d] >= 1 && size[d] <= (d < 2 ? kMostChannels : kLargest),
                      "a weight must have 1 to ", kMostChannels, " channels and sides of 1 to ",
                      kLargest, ", got ", size);
}

// Floats that the packed weight takes; with `weight` and `out`, packs it.
int64_t pack(int64_t algorithm, at::IntArrayRef sizes, const float* weight, float* out) {
  int64_t size = 0;
  decltype(&DEFAULT::conv2d_direct_pack) const kernels[kAlgorithms] = {
      FASTDIFF_KERNEL(conv2d_direct_pack), FASTDIFF_KERNEL(conv2d_winograd2_pack),
      FASTDIFF_KERNEL(conv2d_winograd4_pack), FASTDIFF_KERNEL(conv2d_strassen_pack),
      FASTDIFF_KERNEL(conv2d_phases4_pack)};
  kernels[algorithm](weight, sizes.data(), out, &size, threads());
  return size;
}

int64_t packed_size(at::IntArrayRef weight_size, int64_t algorithm) {
  check_weight_size(weight_size);
  check_algorithm(algorithm, weight_size, {1, 1});
  return pack(algorithm, weight_size, nullptr, nullptr);
}

// Asks for large pages, before anything is written: a weight is read from end to end, once a call.
void prefer_large_pages(const at::Tensor& memory) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 4096, kLargePage = 2 << 20;
  const auto begin = reinterpret_cast<uintptr_t>(memory.data_ptr());
  const auto first = (begin + kPage - 1) / kPage * kPage;
  const auto last = (begin + memory.nbytes()) / kPage * kPage;
  // Advice: where it cannot be had, nothing changes.
  if (last >= first + kLargePage)
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

at::Tensor conv2d_pack_cpu(const at::Tensor& weight, int64_t algorithm) {
  check_float_or_bfloat16(weight, "weight");
  auto out =
      at::empty({packed_size(weight.sizes(), algorithm)}, weight.options().dtype(at::kFloat));
  prefer_large_pages(out);
  const auto plain = weight.to(at::kFloat).contiguous();
  pack(algorithm, weight.sizes(), plain.const_data_ptr<float>(), out.mutable_data_ptr<float>());
  return out;
}

// x, or a copy of it, with the channels of a pixel side by side and the pixels in order, `ld`
// apart.
at::Tensor by_pixel(const at::Tensor& x, int64_t* ld) {
  const int64_t n = x.size(0), c = x.size(1), h = x.size(2), w = x.size(3);
  const auto lies = [](int64_t size, int64_t stride, int64_t wanted) {
    return size <= 1 || stride == wanted;
  };
  // The distance of two pixels, from the innermost dimension that has two.
  *ld = w > 1 ? x.stride(3) : h > 1 ? x.stride(2) : n > 1 ? x.stride(0) : c;
  if (lies(c, x.stride(1), 1) && *ld >= c && lies(w, x.stride(3), *ld) &&
      lies(h, x.stride(2), *ld * w) && lies(n, x.stride(0), *ld * w * h))
    return x;
  *ld = c;
  return x.contiguous(at::MemoryFormat::ChannelsLast);
}

// value [N, K] or a copy of it with rows of neighbours, `ld` apart.
at::Tensor by_row(const at::Tensor& value, int64_t* ld) {
  const bool lies =
      (value.size(1) <= 1 || value.stride(1) == 1) && (value.size(0) <= 1 || value.stride(0) >= 0);
  const auto out = lies ? value : value.contiguous();
  *ld = out.stride(0);
  return out;
}

std::tuple<at::Tensor, at::Tensor> conv2d_cpu(const at::Tensor& x, const Optional& skip,
                                              const at::Tensor& packed, at::IntArrayRef weight_size,
                                              int64_t algorithm, const Optional& bias,
                                              at::IntArrayRef stride, at::IntArrayRef padding,
                                              bool upsample, const Optional& norm, bool silu,
                                              const Optional& emb, const Optional& residual,
                                              double scale, bool statistics, bool gated) {
  check_float_or_bfloat16(x, "x");
  TORCH_CHECK_VALUE(x.dim() == 4, "x must be [N, C, H, W], got ", x.sizes());
  check_weight_size(weight_size);
  TORCH_CHECK_VALUE(stride.size() == 2 && padding.size() == 4,
                    "wanted two strides and four paddings, got ", stride, " and ", padding);
  for (const auto step : stride)
    TORCH_CHECK_VALUE(step >= 1 && step <= kLargest, "stride must be 1 to ", kLargest, ", got ",
                      stride);
  for (const auto side : padding)
    TORCH_CHECK_VALUE(side >= 0 && side <= kLargest, "padding must be 0 to ", kLargest, ", got ",
                      padding);
  check_algorithm(algorithm, weight_size, stride);
  TORCH_CHECK_VALUE(algorithm != kPhases4 || (upsample && (padding[0] + padding[1]) % 2 == 0 &&
                                              (padding[2] + padding[3]) % 2 == 0),
                    "phases are of upsampled images with even padding, got upsample ", upsample,
                    " and padding ", padding);
  const auto type = x.scalar_type();
  const int64_t n = x.size(0), h = x.size(2), w = x.size(3), k = weight_size[0];
  int64_t channels = x.size(1);
  if (skip) {
    TORCH_CHECK_VALUE(skip->dim() == 4, "skip must be [N, C, H, W], got ", skip->sizes());
    check_tensor(*skip, {n, skip->size(1), h, w}, type, "skip");
    channels += skip->size(1);
  }
  TORCH_CHECK_VALUE(weight_size[1] == channels, "a weight of ", weight_size,
                    " does not fit an input of ", channels, " channels");
  check_tensor(packed, {pack(algorithm, weight_size, nullptr, nullptr)}, at::kFloat, "packed");
  TORCH_CHECK_VALUE(packed.is_contiguous(), "packed must be contiguous");
  const int64_t up = upsample ? 2 : 1;
  const int64_t tall = up * h + padding[0] + padding[1], wide = up * w + padding[2] + padding[3];
  TORCH_CHECK_VALUE(h >= 1 && w >= 1 && tall >= weight_size[2] && wide >= weight_size[3],
                    "an input of ", x.sizes(), " is smaller than the kernel ",
                    weight_size.slice(2));
  const int64_t out_h = (tall - weight_size[2]) / stride[0] + 1,
                out_w = (wide - weight_size[3]) / stride[1] + 1;
  if (gated) {
    TORCH_CHECK_VALUE(
        (algorithm == kDirect || algorithm == kStrassen) && k % kGated == 0,
        "a gated convolution is direct or Strassen's and has filters in multiples of ", kGated,
        ", got algorithm ", algorithm, " and ", k, " filters");
    TORCH_CHECK_VALUE(!emb && !residual && scale == 1 && !statistics,
                      "a gated convolution has no emb, residual, scale or statistics");
  }
  if (bias) check_tensor(*bias, {k}, type, "bias");
  if (norm) check_tensor(*norm, {n, 2, channels}, at::kFloat, "norm");
  if (emb) check_tensor(*emb, {n, k}, type, "emb");
  if (residual) check_tensor(*residual, {n, k, out_h, out_w}, type, "residual");

  auto y =
      at::empty({n, gated ? k / 2 : k, out_h, out_w}, x.options(), at::MemoryFormat::ChannelsLast);
  auto found = at::empty({statistics ? n : 0, k, 2}, x.options().dtype(at::kDouble));
  if (!statistics) found = at::empty({0}, found.options());
  if (n == 0) return {y, found};

  Conv2d p{.dtype = type,
           .images = n,
           .height = h,
           .width = w,
           .x_channels = x.size(1),
           .channels = channels,
           .filters = k,
           .kernel_h = weight_size[2],
           .kernel_w = weight_size[3],
           .stride_h = stride[0],
           .stride_w = stride[1],
           .top = padding[0],
           .left = padding[2],
           .out_height = out_h,
           .out_width = out_w,
           .upsample = upsample,
           .silu = silu,
           .gated = gated,
           .scale = static_cast<float>(scale)};
  const auto x_held = by_pixel(x, &p.x_ld);
  at::Tensor skip_held, norm_held, bias_held, emb_held, residual_held;
  p.x = x_held.const_data_ptr();
  if (skip) p.skip = (skip_held = by_pixel(*skip, &p.skip_ld)).const_data_ptr();
  if (norm) p.norm = (norm_held = norm->contiguous()).const_data_ptr<float>();
  if (bias) p.bias = (bias_held = bias->contiguous()).const_data_ptr();
  if (emb) p.emb = (emb_held = by_row(*emb, &p.emb_ld)).const_data_ptr();
  if (residual) p.residual = (residual_held = by_pixel(*residual, &p.residual_ld)).const_data_ptr();
  p.packed = packed.const_data_ptr<float>();
  p.y = y.mutable_data_ptr();
  p.statistics = statistics ? found.mutable_data_ptr<double>() : nullptr;
  p.threads = threads();
  decltype(&DEFAULT::conv2d_direct) const kernels[kAlgorithms] = {
      FASTDIFF_KERNEL(conv2d_direct), FASTDIFF_KERNEL(conv2d_winograd2),
      FASTDIFF_KERNEL(conv2d_winograd4), FASTDIFF_KERNEL(conv2d_strassen),
      FASTDIFF_KERNEL(conv2d_phases4)};
  kernels[algorithm](p);
  return {y, found};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastdiff, CompositeExplicitAutograd, m) {
  m.impl("conv2d_packed_size", packed_size);
}

TORCH_LIBRARY_IMPL(fastdiff, CPU, m) {
  m.impl("conv2d_pack", conv2d_pack_cpu);
  m.impl("conv2d", conv2d_cpu);
}

}  // namespace fastdiff
