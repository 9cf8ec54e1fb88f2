// channel_statistics, from which group_norm_coefficients are computed. One pass: of each run of
// pixels the sums of x - pivot and (x - pivot)^2, where pivot is the run's first pixel; moments.h
// joins the runs.
#include "cpu/kernels/group_norm_coefficients.h"

#include <algorithm>

#include "cpu/kernels/dtypes.h"
#include "cpu/kernels/moments.h"

namespace fastdiff::CPU_CAPABILITY {
namespace {

constexpr int64_t kRunPixels = 32;

template <class T>
void unit(const ChannelStatistics& p, int64_t image, int64_t first, int64_t last) {
  using Wide = typename Lanes<T>::Wide;
  Wide pivot[kStatisticsChannels], sum[kStatisticsChannels], squares[kStatisticsChannels];
  double mean[kStatisticsChannels] = {}, m2[kStatisticsChannels] = {};
  const int64_t width = last - first;
  const T* x = static_cast<const T*>(p.x) + image * p.pixels * p.channels + first;
  for (int64_t begin = 0; begin < p.pixels; begin += kRunPixels) {
    const int64_t end = std::min(p.pixels, begin + kRunPixels);
    for (int64_t c = 0; c < width; ++c) {
      pivot[c] = static_cast<Wide>(x[begin * p.channels + c]);
      sum[c] = squares[c] = 0;
    }
    for (int64_t i = begin + 1; i < end; ++i)
      for (int64_t c = 0; c < width; ++c) {
        const Wide centred = static_cast<Wide>(x[i * p.channels + c]) - pivot[c];
        sum[c] += centred;
        squares[c] += centred * centred;
      }
    const JoinChannels moments(begin, end - begin);
    for (int64_t c = 0; c < width; ++c)
      moments.join_sums(mean[c], m2[c], pivot[c], sum[c], squares[c]);
  }
  double* out = p.out + (image * p.channels + first) * 2;
  for (int64_t c = 0; c < width; ++c) {
    out[2 * c] = mean[c];
    out[2 * c + 1] = m2[c] / static_cast<double>(p.pixels);
  }
}

}  // namespace

void channel_statistics(const ChannelStatistics& p, int64_t begin, int64_t end) {
  const int64_t units = (p.channels + kStatisticsChannels - 1) / kStatisticsChannels;  // an image
  for_floating(p.dtype, [&]<class T>() {
    for (int64_t index = begin; index < end; ++index) {
      const int64_t first = index % units * kStatisticsChannels;
      unit<T>(p, index / units, first, std::min(p.channels, first + kStatisticsChannels));
    }
  });
}

}  // namespace fastdiff::CPU_CAPABILITY
