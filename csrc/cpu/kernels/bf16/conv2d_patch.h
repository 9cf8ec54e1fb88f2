// What a convolution with bfloat16 products reads: the patch of a segment, normalised, activated,
// upsampled and padded as in conv2d_patch.h, rounded to bfloat16, and laid out so that the 16
// pixels of each group lie evenly (products.h), for every tap of the kernel.
//
// The patch is in planes of 32 channels, 64 bytes a pixel. Where the segment's lines are multiples
// of 16 pixels a plane is [rows][columns], and a tap is an offset. Else a plane is kept once for
// each column of the kernel, [kernel_w][rows][width], without the pixels between the segment's
// lines, so that a group may begin anywhere and go on in the next line. There, rows are sorted by
// their remainder by the stride.
#pragma once

#include <cstring>

#include "cpu/kernels/activations.h"
#include "cpu/kernels/bf16/products.h"
#include "cpu/kernels/conv2d.h"
#include "cpu/kernels/conv2d_grid.h"

namespace fastdiff::CPU_CAPABILITY {

// x * sigmoid(x) for what is rounded to bfloat16 next: relative error 1.5e-4.
FASTDIFF_INLINE F silu_for_bf16(F x) {
#ifdef CPU_CAPABILITY_AVX512
  const F e = exp2_by_floor<3>(x * static_cast<float>(-kLog2e)) + 1.f;
  return x * reinterpret_cast<F>(_mm512_rcp14_ps(reinterpret_cast<__m512>(e)));
#else
  return silu(x);
#endif
}

// Channels c..c+31 of a pixel of the images, in kParts values each: itself, or, for float32, what
// is left of it, too. `gain` is the image's part of p.norm. Missing channels are zero.
template <class T, bool kNorm, bool kSilu, int kParts>
FASTDIFF_INLINE void read_plane(const Conv2d& p, int64_t pixel, const float* gain, int64_t c,
                                bf16 (&values)[kParts][kColumns]) {
  const T* x = static_cast<const T*>(p.x) + pixel * p.x_ld;
  const T* skip = p.skip ? static_cast<const T*>(p.skip) + pixel * p.skip_ld : nullptr;
  const int64_t count = std::min(kColumns, p.channels - c);
  const T* from = x + c;
  T mixed[kColumns];
  if (c >= p.x_channels) {
    from = skip + c - p.x_channels;
  } else if (c + count > p.x_channels) {
    const int64_t own = p.x_channels - c;
    std::memcpy(mixed, from, own * sizeof(T));
    std::memcpy(mixed + own, skip, (count - own) * sizeof(T));
    from = mixed;
  }
  if constexpr (std::is_same_v<T, bf16> && !kNorm && !kSilu) {
    using At = at::vec::Vectorized<bf16>;
    for (int64_t i = 0; i < kColumns; i += At::size())
      At::loadu(from + i, std::clamp<int64_t>(count - i, 0, At::size())).store(values[0] + i);
    return;
  }
  for (int64_t first = 0; first < kColumns; first += kLanes) {
    const int64_t lanes = std::clamp<int64_t>(count - first, 0, kLanes);
    F value = load_lanes(from + first, lanes);
    if constexpr (kNorm)
      value = value * load_lanes(gain + c + first, lanes) +
              load_lanes(gain + p.channels + c + first, lanes);
    if constexpr (kSilu) value = kParts > 1 ? silu(value) : silu_for_bf16(value);
    store_lanes(values[0] + first, value);
    if constexpr (kParts > 1) {
      // An infinity has no remainder.
      const F rest = value - load_lanes(values[0] + first);
      store_lanes(values[1] + first, rest == rest ? rest : F{});
    }
  }
}

// kParts values of bfloat16 for each value, as read_plane() makes them.
template <class T, int kParts>
struct Patch {
  const Conv2d& p;
  const int64_t height, width;  // outputs
  const int64_t rows, columns;  // inputs
  const bool lines;             // whether the segment's lines are whole groups
  const int64_t sorted_rows;    // of one remainder
  const int64_t part_bytes, plane_bytes;
  const int64_t planes;

  Patch(const Conv2d& p, const Segment& segment)
      : p(p),
        height(segment.bottom - segment.top),
        width(segment.width()),
        rows((height - 1) * p.stride_h + p.kernel_h),
        columns((width - 1) * p.stride_w + p.kernel_w),
        lines(width % kGroup == 0),
        sorted_rows((rows + p.stride_h - 1) / p.stride_h),
        part_bytes(64 * (lines ? rows * columns : p.kernel_w * sorted_rows * p.stride_h * width)),
        plane_bytes(part_bytes * kParts),
        planes((p.channels + kColumns - 1) / kColumns) {}

  int64_t bytes() const { return planes * plane_bytes; }
  int64_t spacing() const { return lines ? 64 * p.stride_w : 64; }
  // What may be read behind the patch by its last group.
  static constexpr int64_t kBehind = kGroup * 64;

  // Where output `pixel` of the segment begins.
  int64_t at(int64_t pixel) const {
    if (!lines) return 64 * pixel;
    return 64 * (pixel / width * p.stride_h * columns + pixel % width * p.stride_w);
  }

  int64_t tap(int64_t r, int64_t s) const {
    if (lines) return 64 * (r * columns + s);
    return 64 * width * (s * sorted_rows * p.stride_h + sorted(r));
  }

  int64_t sorted(int64_t row) const { return row % p.stride_h * sorted_rows + row / p.stride_h; }

  // Fills row `row` of the patch of a segment at `out`.
  template <bool kNorm, bool kSilu>
  void read_as(const Segment& segment, int64_t row, char* out) const {
    const int up = p.upsample ? 1 : 0;
    const int64_t y = segment.top * p.stride_h - p.top + row;
    const int64_t left = segment.left * p.stride_w - p.left;
    const bool inside = y >= 0 && y < p.height << up;
    const int64_t line = (segment.image * p.height + (y >> up)) * p.width;
    const float* gain = kNorm ? p.norm + segment.image * 2 * p.channels : nullptr;
    for (int64_t z = 0; z < columns; ++z) {
      char* to[kMostCopies];
      int copies = 0;
      if (lines) {
        to[copies++] = out + 64 * (row * columns + z);
      } else {
        const int64_t first = sorted(row), step = sorted_rows * p.stride_h;
        for (int64_t s = z % p.stride_w; s <= std::min(z, p.kernel_w - 1); s += p.stride_w)
          if ((z - s) / p.stride_w < width)
            to[copies++] = out + 64 * ((s * step + first) * width + (z - s) / p.stride_w);
      }
      const int64_t x = left + z;
      if (inside && x >= 0 && x < p.width << up) {
        read_pixel<kNorm, kSilu>(line + (x >> up), gain, to, copies);
      } else {
        for (int i = 0; i < copies; ++i)
          for (int64_t at = 0; at < bytes(); at += part_bytes) std::memset(to[i] + at, 0, 64);
      }
    }
  }

  void read(const Segment& segment, int64_t row, char* out) const {
    if (p.norm) {
      if (p.silu) return read_as<true, true>(segment, row, out);
      return read_as<true, false>(segment, row, out);
    }
    if (p.silu) return read_as<false, true>(segment, row, out);
    read_as<false, false>(segment, row, out);
  }

 private:
  static constexpr int kMostCopies = 64;  // the widest kernel

  template <bool kNorm, bool kSilu>
  FASTDIFF_INLINE void read_pixel(int64_t pixel, const float* gain, char* const* to,
                                  int copies) const {
    int64_t at = 0;
    for (int64_t c = 0; c < p.channels; c += kColumns, at += plane_bytes) {
      alignas(64) bf16 values[kParts][kColumns];
      read_plane<T, kNorm, kSilu>(p, pixel, gain, c, values);
      for (int i = 0; i < copies; ++i)
        for (int part = 0; part < kParts; ++part)
          std::memcpy(to[i] + at + part * part_bytes, values[part], 64);
    }
  }
};

}  // namespace fastdiff::CPU_CAPABILITY
