// Units of work for images whose noise is computed from a seed inside the kernel.
//
// A counter of Philox gives the noise of four consecutive elements of [C, pixels]. Channels-first,
// these four elements are in one vector of a thread. Channels-last, they are one channel of four
// pixels, so a thread takes four pixels, of as many channels as a vector holds. In images of three
// or four channels a pixel is narrower than a vector, so a thread takes four or eight whole pixels,
// which are whole vectors. No counter is computed twice unless the number of pixels is not a
// multiple of four.
//
// A unit NoiseUnit<T, W, Form> is kVectors vectors of W elements. Vector v begins at element at(v)
// of its image's memory, and belongs to the image where inside(v). fill() gives the noise of all
// elements of the unit.
#pragma once

#include <cstdint>

#include "cuda/access.cuh"
#include "cuda/philox.cuh"

namespace fastdiff::cuda {

// How an image is divided into units.
struct NoiseImage {
  int64_t channels, pixels;
  int64_t vectors;    // in a pixel
  Divisor per_pixel;  // divides by `vectors`
  int64_t units;
};

// Forms of a unit. The form of whole pixels is the image's number of channels, 3 or 4.
constexpr int kRow = 0;         // channels-first: one vector, or as many as hold four elements
constexpr int kPixel = 1;       // channels-last: W channels of one pixel
constexpr int kFourPixels = 2;  // channels-last: W channels of four pixels

template <class T, int W, int Form>
struct NoiseUnit {  // whole pixels: the fewest, a multiple of four, that are a multiple of 16 bytes
  static_assert(W == kWidth<T>);
  static constexpr int kPixels = Form * 4 % W == 0 ? 4 : 8, kVectors = kPixels * Form / W;
  int64_t pixel, pixels;

  __device__ __forceinline__ NoiseUnit(const NoiseImage& image, int64_t unit)
      : pixel(unit * kPixels), pixels(image.pixels) {}
  __device__ __forceinline__ int64_t at(int v) const { return pixel * Form + v * W; }
  __device__ __forceinline__ bool inside(int) const { return true; }
  __device__ __forceinline__ void fill(const PhiloxStream& stream, float (&z)[kVectors][W]) const {
#pragma unroll
    for (int c = 0; c < Form; ++c) {
#pragma unroll
      for (int p = 0; p < kPixels; p += 4) {
        float values[4];
        stream.normal((c * pixels + pixel + p) / 4, values);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int element = (p + j) * Form + c;
          z[element / W][element % W] = values[j];
        }
      }
    }
  }
};

template <class T, int W>
struct NoiseUnit<T, W, kRow> {
  static constexpr int kElements = W < 4 ? 4 : W, kVectors = kElements / W;
  int64_t first, size;

  __device__ __forceinline__ NoiseUnit(const NoiseImage& image, int64_t unit)
      : first(unit * kElements), size(image.channels * image.pixels) {}
  __device__ __forceinline__ int64_t at(int v) const { return first + v * W; }
  __device__ __forceinline__ bool inside(int v) const { return kVectors == 1 || at(v) < size; }
  __device__ __forceinline__ void fill(const PhiloxStream& stream, float (&z)[kVectors][W]) const {
#pragma unroll
    for (int q = 0; q < kElements; q += 4) {
      float values[4];
      stream.normal((first + q) / 4, values);
#pragma unroll
      for (int j = 0; j < 4; ++j) z[(q + j) / W][(q + j) % W] = values[j];
    }
  }
};

template <class T, int W, int Pixels>
struct NoiseChannels {
  static constexpr int kVectors = Pixels;
  int64_t channel, pixel, channels, pixels;

  __device__ __forceinline__ NoiseChannels(const NoiseImage& image, int64_t unit)
      : channels(image.channels), pixels(image.pixels) {
    const int64_t group = image.per_pixel.divide(unit);
    channel = (unit - group * image.vectors) * W;
    pixel = group * Pixels;
  }
  __device__ __forceinline__ int64_t at(int v) const { return (pixel + v) * channels + channel; }
  __device__ __forceinline__ bool inside(int) const { return true; }
  __device__ __forceinline__ void fill(const PhiloxStream& stream, float (&z)[kVectors][W]) const {
#pragma unroll
    for (int j = 0; j < W; ++j) {
      const int64_t element = (channel + j) * pixels + pixel;
      if constexpr (Pixels == 4) {
        float values[4];
        stream.normal(element / 4, values);
#pragma unroll
        for (int p = 0; p < 4; ++p) z[p][j] = values[p];
      } else {
        z[0][j] = stream.normal_at(element);
      }
    }
  }
};
template <class T, int W>
struct NoiseUnit<T, W, kPixel> : NoiseChannels<T, W, 1> {
  using NoiseChannels<T, W, 1>::NoiseChannels;
};
template <class T, int W>
struct NoiseUnit<T, W, kFourPixels> : NoiseChannels<T, W, 4> {
  using NoiseChannels<T, W, 4>::NoiseChannels;
};

// Calls f(width, form, image) with the widest units for images at addresses of this alignment.
// `width` is W and `form` is Form, as integral constants.
template <class T, class F>
void for_noise_unit(bool channels_last, int64_t channels, int64_t pixels, int64_t alignment, F f) {
  const auto call = [&](auto width, auto form, int64_t vectors, int64_t units) {
    f(width, form, NoiseImage{channels, pixels, vectors, Divisor(vectors), units});
  };
  constexpr auto widest = std::integral_constant<int, kWidth<T>>{};
  if (!channels_last || channels == 1 || pixels == 1) {
    const int64_t size = channels * pixels;
    return for_width<T>(common_alignment(alignment, size * sizeof(T)), [&](auto width) {
      using Unit = NoiseUnit<T, decltype(width)::value, kRow>;
      call(width, std::integral_constant<int, kRow>{}, 1, ceil_div(size, Unit::kElements));
    });
  }
  const auto whole_pixels = [&](auto form) {
    constexpr int kPixels = NoiseUnit<T, kWidth<T>, decltype(form)::value>::kPixels;
    const bool fits = channels == form && alignment == 16 && pixels % kPixels == 0;
    if (fits) call(widest, form, 1, pixels / kPixels);
    return fits;
  };
  if (whole_pixels(std::integral_constant<int, 3>{}) ||
      whole_pixels(std::integral_constant<int, 4>{}))
    return;
  for_width<T>(common_alignment(alignment, channels * sizeof(T)), [&](auto width) {
    const int64_t vectors = channels / width;
    if (pixels % 4 == 0)
      call(width, std::integral_constant<int, kFourPixels>{}, vectors, pixels / 4 * vectors);
    else
      call(width, std::integral_constant<int, kPixel>{}, vectors, pixels * vectors);
  });
}

}  // namespace fastdiff::cuda
