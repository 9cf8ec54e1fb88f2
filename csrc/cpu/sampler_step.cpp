// fastdiff::sampler_step on CPU tensors; the arithmetic is in kernels/sampler_step.cpp.
#include "cpu/kernels/sampler_step.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <torch/library.h>

#include <array>
#include <bit>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "cpu/philox_normal.h"
#include "cpu/tensors.h"

namespace fastdiff {
namespace {

// The bits of a non-negative value order as the value does, with NaN above all others: a total
// order, which std::nth_element needs.
template <class Bits, class Wide>
double quantile_of(Bits* values, int64_t count, double q) {
  static_assert(sizeof(Bits) == sizeof(Wide));
  const auto value = [](Bits bits) { return static_cast<double>(std::bit_cast<Wide>(bits)); };
  const double position = std::min(q, 1.0) * static_cast<double>(count - 1);
  const auto below = static_cast<int64_t>(position);
  std::nth_element(values, values + below, values + count);
  const Bits low = values[below];
  if (std::isnan(value(*std::max_element(values + below, values + count))))
    return std::numeric_limits<double>::quiet_NaN();
  const double share = position - static_cast<double>(below);
  if (share == 0) return value(low);
  const Bits high = *std::min_element(values + below + 1, values + count);
  return value(low) + share * (value(high) - value(low));
}

void sampler_step_cpu(const at::Tensor& x, const at::Tensor& model_out,
                      const std::optional<at::Tensor>& history,
                      const std::optional<at::Tensor>& noise, const at::Tensor& table,
                      const at::Tensor& step, const std::optional<at::Tensor>& seed,
                      const at::Tensor& out) {
  check_floating(x, "x");
  const auto type = x.scalar_type(), wide = wide_type(type);
  TORCH_CHECK_VALUE(x.dim() >= 2 && model_out.dim() == x.dim(),
                    "x and model_out must be [N, C, ...], got ", x.sizes(), " and ",
                    model_out.sizes());
  const bool guided = model_out.size(0) == 2 * x.size(0) && x.size(0) > 0;
  const bool has_variance = model_out.size(1) == 2 * x.size(1) && x.size(1) > 0;
  c10::DimVector wanted(x.sizes());
  if (guided) wanted[0] *= 2;
  if (has_variance) wanted[1] *= 2;
  check_tensor(model_out, wanted, type, "model_out (like x, or of twice its images or channels)");
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
    check_tensor(*history, sizes, wide, "history");
  }
  TORCH_CHECK_VALUE(table.dim() == 2, "table must be [R, ", static_cast<int>(kSamplerColumns),
                    " + K], got ", table.sizes());
  check_tensor(table, {table.size(0), kSamplerColumns + depth}, wide, "table");
  TORCH_CHECK_TYPE(step.scalar_type() == at::kLong && step.numel() == 1,
                   "step must be an int64 tensor of one element");
  TORCH_CHECK_VALUE(step.device().is_cpu(), "step must be on the CPU, got ", step.device());
  if (seed) {
    TORCH_CHECK_VALUE(!noise, "noise and seed cannot both be given");
    check_seed(*seed, x);
  }
  const int64_t index = *step.const_data_ptr<int64_t>();
  TORCH_CHECK_INDEX(index >= 0 && index < table.size(0), "step must lie in 0..", table.size(0) - 1,
                    ", got ", index);

  std::array<double, kSamplerColumns + kSamplerDepth> row;
  for (int64_t j = 0; j < kSamplerColumns + depth; ++j) {
    const int64_t at = index * table.stride(0) + j * table.stride(1);
    row[j] = wide == at::kDouble ? table.const_data_ptr<double>()[at]
                                 : table.const_data_ptr<float>()[at];
  }
  const bool keeps = depth > 0 && !(row[kSlot] < 0);
  TORCH_CHECK_INDEX(!keeps || row[kSlot] < static_cast<double>(depth),
                    "the row's slot must lie below ", depth, ", the history's depth, got ",
                    row[kSlot]);
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
  if (x.numel() == 0) return;

  const auto format = layout_of(x);
  const auto a = x.contiguous(format), m = model_out.contiguous(format);
  SamplerStepArgs args{};
  args.dtype = type;
  args.row = row.data();
  args.total = x.numel();
  args.channels = x.size(1);
  args.guided = guided;
  args.has_variance = has_variance;
  args.interleaved = has_variance && format != at::MemoryFormat::Contiguous;
  args.x = a.const_data_ptr();
  args.model_out = m.const_data_ptr();

  const bool noisy = (noise || seed) && (row[kNoise] != 0 || row[kKeepNoise] != 0);
  args.learned = has_variance && noisy && row[kNoise] != 0 && row[kLogvarV] != 0;
  at::Tensor z, seeds;
  if (noisy && noise) {
    z = noise->contiguous(format);
    args.noise = z.const_data_ptr();
  } else if (noisy && format == at::MemoryFormat::Contiguous) {
    seeds = seed->contiguous();
    args.seed = seeds.const_data_ptr<int64_t>();
    args.step = static_cast<uint32_t>(index);
  } else if (noisy) {  // the generator counts elements channels-first
    z = at::empty(x.sizes(), x.options().dtype(wide));
    fill_philox_normal(*seed, static_cast<uint32_t>(index), z);
    z = z.contiguous(format);
    args.wide_noise = z.const_data_ptr();
  }

  at::Tensor slots;
  if (history) {
    slots = *history;
    if (!slots_like(slots, a)) {
      c10::DimVector strides{a.numel()};
      strides.append(a.strides().begin(), a.strides().end());
      slots = at::empty_strided(history->sizes(), strides, history->options()).copy_(*history);
    }
    const auto slot = [&](int64_t j) {
      return static_cast<char*>(slots.data_ptr()) + j * slots.stride(0) * slots.itemsize();
    };
    for (int64_t j = 0; j < depth; ++j) {
      if (row[kSamplerColumns + j] == 0) continue;
      args.read[args.reads] = slot(j);
      args.factor[args.reads++] = row[kSamplerColumns + j];
    }
    if (keeps) args.keep = slot(static_cast<int64_t>(row[kSlot]));
  }

  // An element may be written where the same element was read, and nowhere else.
  const auto spoils = [&](const at::Tensor& read) {
    return read.defined() && read.const_data_ptr() != out.const_data_ptr() && overlap(out, read);
  };
  const bool direct = out.is_contiguous(format) && !spoils(a) && !spoils(m) && !spoils(z) &&
                      !(has_variance && overlap(out, m));
  const auto result = direct ? out : empty_like(x, format);
  args.out = result.mutable_data_ptr();

  const int64_t images = x.size(0), image = x.numel() / images;
  const bool rescales = guided && row[kRescale] != 0, thresholds = row[kQuantile] > 0;
  args.length = has_variance || args.seed || rescales || thresholds ? image : x.numel();
  std::vector<double> rescale, limit;
  if (rescales) {
    rescale.resize(images);
    const auto kernel = FASTDIFF_KERNEL(sampler_step_rescale);
    at::parallel_for(0, images, std::max<int64_t>(1, kHeavyGrain / image),
                     [&](int64_t begin, int64_t end) {
                       for (int64_t n = begin; n < end; ++n) kernel(args, n, &rescale[n]);
                     });
    args.rescale = rescale.data();
  }
  if (thresholds) {
    limit.resize(images);
    const auto kernel = FASTDIFF_KERNEL(sampler_step_magnitudes);
    at::parallel_for(
        0, images, std::max<int64_t>(1, kHeavyGrain / image), [&](int64_t begin, int64_t end) {
          const auto values = std::make_unique_for_overwrite<uint64_t[]>(image);
          for (int64_t n = begin; n < end; ++n) {
            kernel(args, n, values.get());
            const double found =
                wide == at::kDouble
                    ? quantile_of<uint64_t, double>(values.get(), image, row[kQuantile])
                    : quantile_of<uint32_t, float>(reinterpret_cast<uint32_t*>(values.get()), image,
                                                   row[kQuantile]);
            // NaN stays: it is not below 1, nor above the limit.
            const double low = found < 1 ? 1 : found;
            limit[n] = low > row[kClipMax] ? row[kClipMax] : low;
          }
        });
    args.limit = limit.data();
  }

  const auto kernel = FASTDIFF_KERNEL(sampler_step);
  at::parallel_for(0, x.numel(), args.seed ? kHeavyGrain : kGrain,
                   [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  if (!direct) out.copy_(result);
  bump_version(out);
  if (history && keeps) {
    if (!slots.is_same(*history)) history->copy_(slots);
    bump_version(*history);
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(fastdiff, CPU, m) { m.impl("sampler_step", sampler_step_cpu); }

}  // namespace fastdiff
