#pragma once

#include <c10/core/ScalarType.h>

#include <cstdint>

#include "cpu/isa.h"

namespace fastdiff {

// How many threads there are, and how they are given work: body(context, begin, end) for ranges
// that together are 0..units-1. PyTorch's threads, from where they are (at::parallel_for is a
// template of a header, which kernels do without).
struct Threads {
  using Body = void (*)(void* context, int64_t begin, int64_t end);
  int64_t count;
  void (*run)(int64_t units, Body body, void* context);
};

// y = (conv(up(silu(norm(cat(x, skip))))) + bias + emb + residual) * scale, or where it is gated
// a * gelu(b), [a, b] being the halves of conv(...) + bias. T is `dtype`, float32 or bfloat16;
// images are [N, H, W, C], a pixel's channels side by side and `ld` elements from the next pixel's.
// Sums are taken in float32.
struct Conv2d {
  c10::ScalarType dtype;
  int64_t images, height, width;        // of x and skip
  int64_t x_channels, channels;         // of x, and of x and skip together
  int64_t filters, kernel_h, kernel_w;  // of the weight
  int64_t stride_h, stride_w, top, left;
  int64_t out_height, out_width;
  bool upsample, silu, gated;
  float scale;
  int64_t x_ld, skip_ld, emb_ld, residual_ld;
  const void* x;
  const void* skip;      // or null
  const float* packed;   // by conv2d_direct_pack or conv2d_winograd_pack
  const float* norm;     // [N, 2, C] or null
  const void* bias;      // [K] or null
  const void* emb;       // [N, K] or null
  const void* residual;  // like y, or null
  void* y;               // [N, H', W', K], or gated K / 2
  double* statistics;    // [N, K, 2], mean and variance; or null
  Threads threads;
};

FASTDIFF_DECLARE(conv2d_direct, const Conv2d&)
FASTDIFF_DECLARE(conv2d_strassen, const Conv2d&)
FASTDIFF_DECLARE(conv2d_winograd2, const Conv2d&)
FASTDIFF_DECLARE(conv2d_winograd4, const Conv2d&)
FASTDIFF_DECLARE(conv2d_phases4, const Conv2d&)

// Packs a weight [K, C, R, S] that has the given strides. With `out` null only `size`, the number
// of floats, is told.
FASTDIFF_DECLARE(conv2d_direct_pack, const float* weight, const int64_t* sizes, float* out,
                 int64_t* size, const Threads&)
FASTDIFF_DECLARE(conv2d_strassen_pack, const float* weight, const int64_t* sizes, float* out,
                 int64_t* size, const Threads&)
FASTDIFF_DECLARE(conv2d_winograd2_pack, const float* weight, const int64_t* sizes, float* out,
                 int64_t* size, const Threads&)
FASTDIFF_DECLARE(conv2d_winograd4_pack, const float* weight, const int64_t* sizes, float* out,
                 int64_t* size, const Threads&)
FASTDIFF_DECLARE(conv2d_phases4_pack, const float* weight, const int64_t* sizes, float* out,
                 int64_t* size, const Threads&)

}  // namespace fastdiff
