// What a convolution reads: a rectangle of the input with its surroundings, normalised, activated,
// upsampled and padded on the way into a buffer that stays in the cache. Each pixel is activated
// once a block, however often the convolution reads it.
#pragma once

#include <cstring>

#include "cpu/kernels/activations.h"
#include "cpu/kernels/conv2d.h"

namespace fastdiff::CPU_CAPABILITY {

constexpr int64_t kPixelsAhead = 6;  // how far ahead pixels are prefetched

// Reads `count` channels of pixels first..last-1 of an upsampled line into `out`. Pixels are `ld`
// elements apart in the line, and `out_ld` apart in `out`.
template <class T, bool kNorm, bool kSilu>
FASTDIFF_INLINE void read_line(const T* line, int64_t ld, int64_t first, int64_t last, int up,
                               const float* gain, const float* offset, int64_t count, float* out,
                               int64_t out_ld) {
  const auto one = [&](const T* in, int64_t c, int64_t lanes, float* to) FASTDIFF_HOT {
    __builtin_prefetch(in + kPixelsAhead * ld + c);
    F value = load_lanes(in + c, lanes);
    if constexpr (kNorm)
      value = value * load_lanes(gain + c, lanes) + load_lanes(offset + c, lanes);
    if constexpr (kSilu) value = silu(value);
    store_lanes(to + c, value, lanes);
  };
  const int64_t whole = count / kLanes * kLanes;
  for (int64_t z = first; z < last; ++z, out += out_ld) {
    const T* in = line + (z >> up) * ld;
    for (int64_t c = 0; c < whole; c += kLanes) one(in, c, kLanes, out);
    if (whole < count) one(in, whole, count - whole, out);
  }
}

// Fills out [rows, columns, ld] with channels begin..end of image `n`, from pixel (row, column) of
// the padded and upsampled image on, where (0, 0) is the first pixel that is not padding.
template <class T, bool kNorm, bool kSilu>
void read_patch_as(const Conv2d& p, int64_t n, int64_t row, int64_t column, int64_t rows,
                   int64_t columns, int64_t begin, int64_t end, float* out, int64_t ld) {
  const int up = p.upsample ? 1 : 0;
  const int64_t height = p.height << up, width = p.width << up;
  const float* gain = kNorm ? p.norm + n * 2 * p.channels : nullptr;
  const float* offset = kNorm ? gain + p.channels : nullptr;
  const int64_t split = std::clamp(p.x_channels, begin, end);
  const auto* x = static_cast<const T*>(p.x);
  const auto* skip = static_cast<const T*>(p.skip);
  const auto zero = [&](float* to, int64_t pixels) {
    for (; pixels > 0; --pixels, to += ld)
      std::memset(to, 0, (end - begin) * static_cast<int64_t>(sizeof(float)));
  };
  const int64_t first = std::clamp<int64_t>(-column, 0, columns),
                last = std::clamp<int64_t>(width - column, first, columns);
  for (int64_t i = 0; i < rows; ++i, out += columns * ld) {
    const int64_t y = row + i;
    if (y < 0 || y >= height) {
      zero(out, columns);
      continue;
    }
    zero(out, first);
    zero(out + last * ld, columns - last);
    const int64_t pixel = (n * p.height + (y >> up)) * p.width;
    float* to = out + first * ld;
    if (begin < split)
      read_line<T, kNorm, kSilu>(x + pixel * p.x_ld + begin, p.x_ld, column + first, column + last,
                                 up, gain + begin, offset + begin, split - begin, to, ld);
    if (split < end)
      read_line<T, kNorm, kSilu>(skip + pixel * p.skip_ld + split - p.x_channels, p.skip_ld,
                                 column + first, column + last, up, gain + split, offset + split,
                                 end - split, to + split - begin, ld);
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
