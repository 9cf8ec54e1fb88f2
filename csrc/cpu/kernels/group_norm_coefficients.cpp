// channel_statistics, from which group_norm_coefficients are computed. One pass: sums of x - x0 and
// (x - x0)^2 with x0 the first pixel, for stretches of pixels that are joined in float64, so that
// neither a large mean nor many pixels cost accuracy.
#include "cpu/kernels/group_norm_coefficients.h"

#include <algorithm>

#include "cpu/kernels/lanes.h"

namespace fastdiff::CPU_CAPABILITY {
namespace {

constexpr int64_t kStretch = 32;

template <class T>
void slice(const ChannelStatistics& p, int64_t image, int64_t first, int64_t last) {
  using Wide = typename Lanes<T>::Wide;
  Wide origin[kStatisticsChannels], sum[kStatisticsChannels], squares[kStatisticsChannels];
  double mean[kStatisticsChannels] = {}, deviation[kStatisticsChannels] = {};
  const int64_t width = last - first;
  const T* x = static_cast<const T*>(p.x) + image * p.pixels * p.channels + first;
  for (int64_t begin = 0; begin < p.pixels; begin += kStretch) {
    const int64_t end = std::min(p.pixels, begin + kStretch);
    for (int64_t c = 0; c < width; ++c) {
      origin[c] = static_cast<Wide>(x[begin * p.channels + c]);
      sum[c] = squares[c] = 0;
    }
    for (int64_t i = begin + 1; i < end; ++i)
      for (int64_t c = 0; c < width; ++c) {
        const Wide centred = static_cast<Wide>(x[i * p.channels + c]) - origin[c];
        sum[c] += centred;
        squares[c] += centred * centred;
      }
    const double n = end - begin, count = begin;
    for (int64_t c = 0; c < width; ++c) {
      const double off = sum[c] / n, delta = origin[c] + off - mean[c];
      deviation[c] += squares[c] - n * off * off + delta * delta * count * n / (count + n);
      mean[c] += delta * n / (count + n);
    }
  }
  double* out = p.out + (image * p.channels + first) * 2;
  for (int64_t c = 0; c < width; ++c) {
    out[2 * c] = mean[c];
    const double variance = deviation[c] / static_cast<double>(p.pixels);
    out[2 * c + 1] = variance < 0 ? 0 : variance;  // NaN stays
  }
}

}  // namespace

void channel_statistics(const ChannelStatistics& p, int64_t begin, int64_t end) {
  const int64_t slices = (p.channels + kStatisticsChannels - 1) / kStatisticsChannels;
  for_dtype(p.dtype, [&](auto tag) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t first = unit % slices * kStatisticsChannels;
      slice<std::remove_pointer_t<decltype(tag)>>(
          p, unit / slices, first, std::min(p.channels, first + kStatisticsChannels));
    }
  });
}

}  // namespace fastdiff::CPU_CAPABILITY
