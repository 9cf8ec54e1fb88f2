#include "cpu/kernels/conv2d.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <torch/library.h>

#include <optional>
#include <tuple>
#include <utility>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "cpu/conv2d_algorithms.h"
#include "cpu/conv2d_input.h"
#include "cpu/conv2d_spec.h"
#include "cpu/tensors.h"

namespace fastdiff {
namespace {

// Asks for large pages, before anything is written: a weight is read from end to end, once a call,
// and small ones would be faulted in one by one when it is first written.
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

// Where a weight's values are, if they are float32 and the taps of a kernel are evenly apart.
std::optional<WeightValues> values_of(const at::Tensor& weight) {
  const int64_t r = weight.size(2), s = weight.size(3), down = weight.stride(2),
                across = weight.stride(3);
  if (weight.scalar_type() != at::kFloat) return std::nullopt;
  if (r > 1 && s > 1 && down != s * across) return std::nullopt;
  return WeightValues{weight.const_data_ptr<float>(), weight.stride(0), weight.stride(1),
                      s > 1 ? across : down};
}

// The weight as contiguous float32. Its memory is kept for the next weight where that is not much:
// new memory takes longer to get than to write.
at::Tensor widened(const at::Tensor& weight) {
  constexpr int64_t kKept = 16 << 20;  // floats
  static thread_local at::Tensor kept;
  const int64_t count = weight.numel();
  at::Tensor memory = kept;
  if (!memory.defined() || memory.numel() < count) {
    memory = at::empty({count}, weight.options().dtype(at::kFloat));
    prefer_large_pages(memory);
    if (count <= kKept) kept = memory;
  }
  // A tensor of its own, as memory that was made in inference mode must not be written outside.
  auto plain = at::from_blob(
      memory.mutable_data_ptr(), weight.sizes(), [memory](void*) {},
      weight.options().dtype(at::kFloat));
  return plain.copy_(weight);
}

at::Tensor conv2d_pack_cpu(const at::Tensor& weight, int64_t number, bool turned) {
  const auto type = weight.scalar_type();
  TORCH_CHECK_TYPE(type == at::kFloat || type == at::kBFloat16 || type == at::kHalf,
                   "weight must be float32, bfloat16 or float16, got ", type);
  check_device(weight, at::kCPU, "weight");
  const auto& algorithm = conv2d_algorithm(number);
  ConvWeight size = decode_weight(weight.sizes());
  if (turned) std::swap(size.filters, size.channels);
  int64_t count = algorithm.packed_count(size);
  auto out = at::empty({count}, weight.options().dtype(algorithm.packed_dtype));
  prefer_large_pages(out);
  at::Tensor plain;
  auto values = values_of(weight);
  if (!values) values = values_of(plain = widened(weight));
  if (turned) {
    std::swap(values->filter, values->channel);
    values->data += (size.kernel_h * size.kernel_w - 1) * values->tap;
    values->tap = -values->tap;
  }
  algorithm.pack(size, *values, out.mutable_data_ptr(), &count, conv2d_threads());
  return out;
}

// value [N, K] or a copy of it with rows of neighbours, `ld` apart.
at::Tensor by_row(const at::Tensor& value, int64_t* ld) {
  const bool lies =
      (value.size(1) <= 1 || value.stride(1) == 1) && (value.size(0) <= 1 || value.stride(0) >= 0);
  const auto out = lies ? value : value.contiguous();
  *ld = out.stride(0);
  return out;
}

std::tuple<at::Tensor, at::Tensor> conv2d_cpu(const at::Tensor& x, const at::Tensor& packed,
                                              at::IntArrayRef numbers, int64_t number,
                                              const OptionalTensor& skip,
                                              const OptionalTensor& bias,
                                              const OptionalTensor& norm, const OptionalTensor& emb,
                                              const OptionalTensor& residual, double scale) {
  const auto& algorithm = conv2d_algorithm(number);
  const ConvSpec spec = decode_spec(numbers);
  const auto reason = algorithm.refusal(spec);
  TORCH_CHECK_VALUE(!reason, *reason, ", got the convolution ", numbers);
  const auto type = x.scalar_type();
  TORCH_CHECK_TYPE(algorithm.takes(type), algorithm.name, " is not for ", type);
  ConvInput input(spec, x, skip, norm);
  Conv2d& p = input.p;
  check_tensor(packed, {algorithm.packed_count(spec)}, algorithm.packed_dtype, "packed");
  TORCH_CHECK_VALUE(packed.is_contiguous(), "packed must be contiguous");
  const int64_t n = p.images, k = spec.filters, out_h = p.out_height, out_w = p.out_width;
  TORCH_CHECK_VALUE(!spec.gated || (!emb && !residual && scale == 1 && !spec.statistics),
                    "a gated convolution has no emb, residual, scale or statistics");
  if (bias) check_tensor(*bias, {k}, type, "bias");
  if (emb) check_tensor(*emb, {n, k}, type, "emb");
  if (residual) check_tensor(*residual, {n, k, out_h, out_w}, type, "residual");

  auto y = at::empty({n, spec.gated ? k / 2 : k, out_h, out_w}, x.options(),
                     at::MemoryFormat::ChannelsLast);
  const auto wide_options = x.options().dtype(at::kDouble);
  auto statistics =
      spec.statistics ? at::empty({n, k, 2}, wide_options) : at::empty({0}, wide_options);
  if (n == 0) return {y, statistics};

  input.hold();
  p.scale = static_cast<float>(scale);
  at::Tensor bias_held, emb_held, residual_held;
  if (bias) p.bias = (bias_held = bias->contiguous()).const_data_ptr();
  if (emb) p.emb = (emb_held = by_row(*emb, &p.emb_ld)).const_data_ptr();
  if (residual) p.residual = (residual_held = by_pixel(*residual, &p.residual_ld)).const_data_ptr();
  p.packed = packed.const_data_ptr();
  p.y = y.mutable_data_ptr();
  p.y_statistics = spec.statistics ? statistics.mutable_data_ptr<double>() : nullptr;
  algorithm.run(p);
  return {y, statistics};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastdiff, CPU, m) {
  m.impl("conv2d_pack", conv2d_pack_cpu);
  m.impl("conv2d", conv2d_cpu);
}

}  // namespace fastdiff
