#pragma once

#include <c10/core/ScalarType.h>

#include <cstdint>

#include "cpu/isa.h"

namespace fastdiff {

// How many threads there are, and how they get work: `run` calls body(context, begin, end) for
// ranges that together are 0..units-1. The bindings fill this in with PyTorch's threads. Kernels do
// not call at::parallel_for themselves: it is a template, of which the linker would keep one
// instruction set's copy.
struct Threads {
  using Body = void (*)(void* context, int64_t begin, int64_t end);
  int64_t count;
  void (*run)(int64_t units, Body body, void* context);
};

// A weight [K, C, R, S].
struct ConvWeight {
  int64_t filters, channels, kernel_h, kernel_w;
};

// The values of a weight, in float32: tap r * S + s of filter k and channel c is
// data[k * filter + c * channel + (r * S + s) * tap]. `tap` is negative where the kernel is turned.
struct WeightValues {
  const float* data;
  int64_t filter, channel, tap;
};

// What a convolution is, whatever images it reads. These are the numbers that ConvSpec of
// fastdiff/ops/conv2d_spec.py encodes, in their order; cpu/conv2d_spec.cpp decodes and checks them.
struct ConvSpec : ConvWeight {
  int64_t stride_h, stride_w;
  int64_t top, bottom, left, right;  // padding, of zeros
  bool upsample, silu, gated, statistics;
};

// y = (conv(up(silu(norm(cat(x, skip))))) + bias + emb + residual) * scale, or where it is gated
// a * gelu(b), [a, b] being the halves of conv(...) + bias. T is `dtype`, float32 or bfloat16;
// images are [N, H, W, C], a pixel's channels side by side and `ld` elements from the next pixel's.
// Sums are taken in float32.
struct Conv2d : ConvSpec {
  c10::ScalarType dtype;
  int64_t images, height, width;  // of x and skip
  int64_t x_channels;             // of all channels the first ones, which are x's and not skip's
  int64_t out_height, out_width;
  float scale;
  int64_t x_ld, skip_ld, emb_ld, residual_ld;
  const void* x;
  const void* skip;      // or null
  const void* packed;    // the weight, by the pack kernel of the algorithm
  const float* norm;     // [N, 2, C] or null
  const void* bias;      // [K] or null
  const void* emb;       // [N, K] or null
  const void* residual;  // like y, or null
  void* y;               // [N, H', W', K], or gated K / 2
  double* y_statistics;  // [N, K, 2], mean and variance; or null
  Threads threads;
};

// The two kernels of an algorithm. NAME computes a convolution. NAME_pack packs a weight,
// and tells in `count` how many elements it then takes; with `packed` null it only tells.
#define FASTDIFF_DECLARE_CONV2D(name)                                                 \
  FASTDIFF_DECLARE(name, const Conv2d&)                                               \
  FASTDIFF_DECLARE(name##_pack, const ConvWeight&, const WeightValues&, void* packed, \
                   int64_t* count, const Threads&)

// The same of an algorithm whose products are of bfloat16.
#define FASTDIFF_DECLARE_CONV2D_BF16(name)                                                 \
  FASTDIFF_DECLARE_BF16(name, const Conv2d&)                                               \
  FASTDIFF_DECLARE_BF16(name##_pack, const ConvWeight&, const WeightValues&, void* packed, \
                        int64_t* count, const Threads&)

// The gradient of a convolution's weight: with h the image that the convolution multiplies, padded,
//
//   dw[k, r, s, c] = sum over n, i, j of dy[n, i, j, k] h[n, i stride_h + r, j stride_w + s, c],
//   sums[n, k] = sum over i, j of dy[n, i, j, k].
//
// Of Conv2d it is the sizes and what the input is read through that count, and not the weight, the
// result and what is added to it. There is one image at least. The result does not depend on the
// number of threads.
struct ConvWeightGradient : Conv2d {
  int64_t dy_ld;
  const void* dy;  // [N, H', W', K] of `dtype`, its pixels `dy_ld` elements apart
  float* dw;       // [K, R, S, C]
  float* sums;     // [N, K]
};

// A third kernel that some algorithms have.
#define FASTDIFF_DECLARE_WEIGHT_GRADIENT(name) \
  FASTDIFF_DECLARE(name##_weight_gradient, const ConvWeightGradient&)
#define FASTDIFF_DECLARE_WEIGHT_GRADIENT_BF16(name) \
  FASTDIFF_DECLARE_BF16(name##_weight_gradient, const ConvWeightGradient&)

}  // namespace fastdiff
