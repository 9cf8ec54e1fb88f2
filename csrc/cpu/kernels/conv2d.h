#pragma once

#include <c10/core/ScalarType.h>

#include <cstdint>
#include <vector>

#include "cpu/isa.h"

namespace fastdiff {

// y = (conv(up(silu(norm(cat(x, skip))))) + bias + emb + residual) * scale. T is `dtype`, float32
// or bfloat16; images are [N, H, W, C], a pixel's channels side by side and `ld` elements from the
// next pixel's. Sums are taken in float32.
struct Conv2d {
  c10::ScalarType dtype;
  int64_t images, height, width;        // of x and skip
  int64_t x_channels, channels;         // of x, and of x and skip together
  int64_t filters, kernel_h, kernel_w;  // of the weight
  int64_t stride_h, stride_w, top, left;
  int64_t out_height, out_width;
  bool upsample, silu;
  float scale;
  int64_t x_ld, skip_ld, emb_ld, residual_ld;
  const void* x;
  const void* skip;      // or null
  const float* packed;   // by conv2d_direct_pack or conv2d_winograd_pack
  const float* norm;     // [N, 2, C] or null
  const void* bias;      // [K] or null
  const void* emb;       // [N, K] or null
  const void* residual;  // like y, or null
  void* y;               // [N, H', W', K]
  double* statistics;    // [N, K, 2], mean and variance; or null
  int64_t threads;
};

// A rectangle of one image's units (pixels, or tiles of a Winograd convolution), whose numbers
// within their block begin at `first`.
struct Segment {
  int64_t image, top, bottom, left, right, first;

  int64_t width() const { return right - left; }
  int64_t units() const { return (bottom - top) * width(); }
};

// A batch's units in blocks, each the segments blocks[i] up to blocks[i + 1] of the list.
struct Grid {
  std::vector<Segment> segments;
  std::vector<int64_t> blocks;
  int64_t largest = 0;  // units of a block at most

  int64_t count() const { return static_cast<int64_t>(blocks.size()) - 1; }
};

FASTDIFF_DECLARE(conv2d_direct, const Conv2d&)
FASTDIFF_DECLARE(conv2d_winograd2, const Conv2d&)
FASTDIFF_DECLARE(conv2d_winograd4, const Conv2d&)

// Packs a weight [K, C, R, S] that has the given strides. With `out` null only `size`, the number
// of floats, is told.
FASTDIFF_DECLARE(conv2d_direct_pack, const float* weight, const int64_t* sizes, float* out,
                 int64_t* size)
FASTDIFF_DECLARE(conv2d_winograd2_pack, const float* weight, const int64_t* sizes, float* out,
                 int64_t* size)
FASTDIFF_DECLARE(conv2d_winograd4_pack, const float* weight, const int64_t* sizes, float* out,
                 int64_t* size)

}  // namespace fastdiff
