// What the ways to compute the gradient of a convolution's weight share: how dy is read, and its
// sums.
#pragma once

#include <cstring>

#include "cpu/kernels/conv2d_grid.h"
#include "cpu/kernels/conv2d_patch.h"

namespace fastdiff::CPU_CAPABILITY {

// Before a function that is to be compiled once. Where share() has one thread the compiler may
// inline what it runs, and it chooses in each copy anew which products and sums become one
// instruction: the last bits would depend on the number of threads.
#ifdef __clang__
#define FASTDIFF_ONE_COPY __attribute__((noinline))
#else
#define FASTDIFF_ONE_COPY __attribute__((noinline, noclone))
#endif

// dy as an image that read_patch() reads: outside of it there are zeros.
inline Conv2d image_of_dy(const ConvWeightGradient& p) {
  Conv2d image = p;
  image.x = p.dy;
  image.x_ld = p.dy_ld;
  image.channels = image.x_channels = p.filters;
  image.height = p.out_height;
  image.width = p.out_width;
  image.skip = nullptr;
  image.norm = nullptr;
  image.silu = image.upsample = false;
  return image;
}

// Chunks of nearly the same size, of at most `most`.
struct Chunks {
  int64_t size, count;

  Chunks(int64_t total, int64_t most) {
    const int64_t least = (total + most - 1) / most;
    size = std::min(total, rounded_up((total + least - 1) / least, kLine));
    count = (total + size - 1) / size;
  }
};

// The sums of dy's pixels, [N, K] in float64. Each element must be added to by one thread at a
// time, and always in the same order.
class PixelSums {
 public:
  PixelSums(int64_t images, int64_t filters) : filters_(filters), totals_(images * filters) {
    std::memset(totals_.data(), 0, images * filters * sizeof(double));
  }

  // Adds `pixels` of an image, `ld` elements apart, to the sums of filters k0..k1-1.
  template <class T>
  void add(int64_t image, int64_t k0, int64_t k1, const T* from, int64_t pixels, int64_t ld) {
    constexpr int64_t kRun = 32;  // pixels that are added up in float32
    double* totals = totals_.data() + image * filters_ + k0;
    for (int64_t i = 0; i < pixels; i += kRun)
      for (int64_t k = 0; k < k1 - k0; k += kLanes) {
        const int64_t lanes = std::min(kLanes, k1 - k0 - k);
        F sum{};
        for (int64_t j = i; j < std::min(i + kRun, pixels); ++j)
          sum += load_lanes(from + j * ld + k, lanes);
        for (int64_t lane = 0; lane < lanes; ++lane) totals[k + lane] += sum[lane];
      }
  }

  void store(float* sums, int64_t images) const {
    for (int64_t i = 0; i < images * filters_; ++i) sums[i] = static_cast<float>(totals_[i]);
  }

 private:
  const int64_t filters_;
  Array<double> totals_;
};

}  // namespace fastdiff::CPU_CAPABILITY
