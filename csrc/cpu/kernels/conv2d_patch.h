// What a convolution reads: a rectangle of the input with its surroundings, normalised, activated,
// upsampled and padded on the way into a buffer that stays in the cache. Each pixel is activated
// once a block, however often the convolution reads it.
#pragma once

#include <cstring>

#include "cpu/kernels/conv2d.h"
#include "cpu/kernels/vectors.h"

namespace fastdiff::CPU_CAPABILITY {

template <class T, bool kNorm, bool kSilu>
FASTDIFF_INLINE void read_channels(const T* in, const float* gain, const float* offset,
                                   int64_t count, float* out) {
  const auto one = [&](int64_t c, int64_t lanes) FASTDIFF_HOT {
    F value = load_lanes(in + c, lanes);
    if constexpr (kNorm)
      value = value * load_lanes(gain + c, lanes) + load_lanes(offset + c, lanes);
    if constexpr (kSilu) value = silu(value);
    store_lanes(out + c, value, lanes);
  };
  int64_t c = 0;
  for (; c + kLanes <= count; c += kLanes) one(c, kLanes);
  if (c < count) one(c, count - c);
}

// Fills out [rows, columns, ld] with channels begin..end of image `n`, from pixel (row, column) of
// the padded and upsampled image on, where (0, 0) is the first pixel that is not padding.
template <class T, bool kNorm, bool kSilu>
void read_patch_as(const Conv2d& p, int64_t n, int64_t row, int64_t column, int64_t rows,
                   int64_t columns, int64_t begin, int64_t end, float* out, int64_t ld) {
  const int64_t up = p.upsample ? 1 : 0, height = p.height << up, width = p.width << up;
  const float* gain = kNorm ? p.norm + n * 2 * p.channels : nullptr;
  const float* offset = kNorm ? gain + p.channels : nullptr;
  const int64_t bytes = (end - begin) * static_cast<int64_t>(sizeof(float));
  const int64_t split = std::clamp(p.x_channels, begin, end);
  const auto* x = static_cast<const T*>(p.x);
  const auto* skip = static_cast<const T*>(p.skip);
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t y = row + i;
    for (int64_t j = 0; j < columns; ++j) {
      float* to = out + (i * columns + j) * ld;
      const int64_t z = column + j;
      if (y < 0 || y >= height || z < 0 || z >= width) {
        std::memset(to, 0, bytes);
        continue;
      }
      const int64_t pixel = (n * p.height + (y >> up)) * p.width + (z >> up);
      if (begin < split)
        read_channels<T, kNorm, kSilu>(x + pixel * p.x_ld + begin, gain + begin, offset + begin,
                                       split - begin, to);
      if (split < end)
        read_channels<T, kNorm, kSilu>(skip + pixel * p.skip_ld + split - p.x_channels,
                                       gain + split, offset + split, end - split,
                                       to + split - begin);
    }
  }
}

template <class T>
void read_patch(const Conv2d& p, int64_t n, int64_t row, int64_t column, int64_t rows,
                int64_t columns, int64_t begin, int64_t end, float* out, int64_t ld) {
  const auto read = p.norm   ? p.silu ? read_patch_as<T, true, true> : read_patch_as<T, true, false>
                    : p.silu ? read_patch_as<T, false, true>
                             : read_patch_as<T, false, false>;
  read(p, n, row, column, rows, columns, begin, end, out, ld);
}

}  // namespace fastdiff::CPU_CAPABILITY
