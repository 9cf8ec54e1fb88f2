// fastdiff::channel_statistics and fastdiff::group_norm_coefficients on CPU tensors. The arithmetic
// of the first is in kernels/group_norm_coefficients.cpp. That of the second is here.
#include "cpu/kernels/group_norm_coefficients.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>
#include <optional>
#include <vector>

#include "cpu/group_statistics.h"
#include "cpu/tensors.h"

namespace fastdiff {
namespace {

using Optional = std::optional<at::Tensor>;

at::Tensor channel_statistics_cpu(const at::Tensor& x) {
  check_floating(x, "x");
  TORCH_CHECK_VALUE(x.dim() >= 2, "x must be [N, C, ...], got ", x.sizes());
  const int64_t n = x.size(0), c = x.size(1);
  auto out = at::empty({n, c, 2}, x.options().dtype(at::kDouble));
  if (x.numel() == 0) return out.fill_(std::nan(""));
  const int64_t pixels = x.numel() / (n * c);
  // [N, P, C], which for channels-last tensors is what lies in memory.
  const auto rows = x.reshape({n, c, pixels}).transpose(1, 2).contiguous();
  const ChannelStatistics p{x.scalar_type(), c, pixels, rows.const_data_ptr(),
                            out.mutable_data_ptr<double>()};
  const int64_t units = (c + kStatisticsChannels - 1) / kStatisticsChannels;
  at::parallel_for(
      0, n * units, std::max<int64_t>(1, kGrain / (kStatisticsChannels * pixels)),
      [&](int64_t begin, int64_t end) { FASTDIFF_KERNEL(channel_statistics)(p, begin, end); });
  return out;
}

at::Tensor group_norm_coefficients_cpu(at::TensorList statistics, int64_t groups,
                                       const Optional& weight, const Optional& bias, double eps,
                                       const Optional& scale, const Optional& shift) {
  GroupStatistics joined(statistics, groups, eps);
  const int64_t n = joined.images(), channels = joined.channels();
  // What scales and shifts, as float32 rows [N or 1, C].
  std::vector<at::Tensor> held;
  std::vector<std::vector<float>> converted;
  const auto rows = [&](const Optional& value, at::IntArrayRef sizes, const char* name) {
    if (!value) return static_cast<const float*>(nullptr);
    TORCH_CHECK_VALUE(value->sizes() == sizes, name, " must have shape ", sizes, ", got ",
                      value->sizes());
    check_floating(*value, name);
    if (value->scalar_type() == at::kBFloat16 && value->is_contiguous()) {
      // A call of PyTorch would take longer than all else that is done here.
      const auto* from = value->const_data_ptr<at::BFloat16>();
      converted.emplace_back(from, from + value->numel());
      return const_cast<const float*>(converted.back().data());
    }
    held.push_back(value->to(at::kFloat).contiguous());
    return held.back().const_data_ptr<float>();
  };
  const float *w = rows(weight, {channels}, "weight"), *b = rows(bias, {channels}, "bias"),
              *grow = rows(scale, {n, channels}, "scale"),
              *move = rows(shift, {n, channels}, "shift");
  auto out = at::empty({n, 2, channels}, joined.options().dtype(at::kFloat));
  if (out.numel() == 0) return out;
  float* gain = out.mutable_data_ptr<float>();
  for (int64_t image = 0; image < n; ++image, gain += 2 * channels)
    joined.for_groups(image, [&](int64_t first, int64_t last, double centre, double rstd) {
      for (int64_t c = first; c < last; ++c) {
        double a = w ? rstd * w[c] : rstd, offset = (b ? b[c] : 0.) - centre * a;
        if (grow) {
          const double grown = 1. + grow[image * channels + c];
          a *= grown, offset *= grown;
        }
        gain[c] = static_cast<float>(a);
        gain[channels + c] =
            static_cast<float>(move ? offset + move[image * channels + c] : offset);
      }
    });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(fastdiff, CPU, m) {
  m.impl("channel_statistics", channel_statistics_cpu);
  m.impl("group_norm_coefficients", group_norm_coefficients_cpu);
}

}  // namespace fastdiff
