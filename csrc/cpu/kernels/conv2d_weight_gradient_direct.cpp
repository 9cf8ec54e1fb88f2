// The gradient of any convolution's weight as products of matrices: for each tap, dy^T [K, pixels]
// times the pixels that the tap multiplies, [pixels, C].
//
// dw is divided into chunks of filters and channels whose sums stay in a core's own cache. Each is
// computed by one thread, which walks over all images: it reads its channels of x (conv2d_patch.h)
// and its filters of dy a block of pixels at a time. So dw is written once, however large it is,
// x is read once for each chunk of filters, dy once for each chunk of channels, and no thread waits
// for another. A window of the patch is kernel_h runs of kernel_w * channels floats, as in
// conv2d_direct.h, and a run is multiplied at once: with few channels, vectors span its taps.
#include "cpu/kernels/conv2d_weight_gradient.h"
#include "cpu/kernels/dtypes.h"
#include "cpu/kernels/gemm_transposed.h"

namespace fastdiff::CPU_CAPABILITY {
namespace {

template <class T>
struct DirectWeightGradient {
  static constexpr int64_t kPixels = 128;  // of a block
  static constexpr int64_t kChannels = 64;

  const ConvWeightGradient p;
  const Conv2d dy;
  const Grid grid;
  const Chunks channels, filters;
  const int64_t run_ld, dy_ld;  // of a row of sums, and of a pixel of a block's dy
  PixelSums sums;

  explicit DirectWeightGradient(const ConvWeightGradient& given)
      : p(in_lines(given)),
        dy(image_of_dy(p)),
        grid(make_grid(p.images, p.out_height, p.out_width, kPixels)),
        channels(p.channels, kChannels),
        filters(p.filters, most_filters(p, channels)),
        run_ld(rounded_up(p.kernel_w * channels.size, kLanes)),
        dy_ld(rounded_up(filters.size, kLine) + kLine),
        sums(p.images, p.filters) {}

  // Filters of a chunk: as many as the cache has room for, but no fewer chunks than keep the
  // threads busy.
  static int64_t most_filters(const Conv2d& p, const Chunks& channels) {
    const int64_t fit = kPrivate / (p.kernel_h * p.kernel_w * channels.size);
    const int64_t each = (2 * p.threads.count + channels.count - 1) / channels.count;
    return std::max(kLine, std::min(fit / kLine * kLine, p.filters / each / kLine * kLine));
  }

  void run() {
    share(p.threads, channels.count * filters.count, [&](int64_t begin, int64_t end) {
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t k0 = unit / channels.count * filters.size,
                      c0 = unit % channels.count * channels.size;
        compute(k0, std::min(p.filters, k0 + filters.size), c0,
                std::min(p.channels, c0 + channels.size));
      }
    });
    sums.store(p.sums, p.images);
  }

  // Filters k0..k1-1 and channels c0..c1-1 of dw.
  FASTDIFF_ONE_COPY void compute(int64_t k0, int64_t k1, int64_t c0, int64_t c1) {
    static thread_local Scratch x_scratch, dy_scratch, dw_scratch;
    const int64_t count = k1 - k0, deep = c1 - c0;
    float* dw = dw_scratch.at_least(p.kernel_h * count * run_ld);
    float* of_dy = dy_scratch.at_least(grid.largest * dy_ld);
    Array<const float*> windows(grid.largest);
    for (int64_t block = 0; block < grid.count(); ++block) {
      const int64_t first = grid.blocks[block], last = grid.blocks[block + 1];
      const Segment& like = grid.segments[first];  // the others of its block are like it
      const int64_t height = (like.bottom - like.top - 1) * p.stride_h + p.kernel_h,
                    width = (like.width() - 1) * p.stride_w + p.kernel_w;
      // Whole vectors of a run are read.
      float* patch = x_scratch.at_least((last - first) * height * width * deep + kPanel);
      windows.clear();
      for (int64_t s = first; s < last; ++s, patch += height * width * deep) {
        const Segment& segment = grid.segments[s];
        float* pixels = of_dy + segment.first * dy_ld;
        read_patch<T>(dy, segment.image, segment.top, segment.left, segment.bottom - segment.top,
                      segment.width(), k0, k1, pixels, dy_ld);
        if (c0 == 0) sums.add(segment.image, k0, k1, pixels, segment.tiles(), dy_ld);
        read_patch<T>(p, segment.image, segment.top * p.stride_h - p.top,
                      segment.left * p.stride_w - p.left, height, width, c0, c1, patch, deep);
        for (int64_t i = 0; i < segment.bottom - segment.top; ++i)
          for (int64_t j = 0; j < segment.width(); ++j)
            windows.add(patch + (i * p.stride_h * width + j * p.stride_w) * deep);
      }
      for (int64_t r = 0; r < p.kernel_h; ++r)
        multiply_transposed(windows.size(), of_dy, dy_ld, count, windows.data(), r * width * deep,
                            p.kernel_w * deep, Into{dw + r * count * run_ld, run_ld, block > 0});
    }
    for (int64_t r = 0; r < p.kernel_h; ++r)
      for (int64_t k = 0; k < count; ++k)
        for (int64_t s = 0; s < p.kernel_w; ++s)
          std::memcpy(p.dw + (((k0 + k) * p.kernel_h + r) * p.kernel_w + s) * p.channels + c0,
                      dw + (r * count + k) * run_ld + s * deep, deep * sizeof(float));
  }
};

}  // namespace

void conv2d_direct_weight_gradient(const ConvWeightGradient& p) {
  for_float_or_bfloat16(p.dtype, [&]<class T>() { DirectWeightGradient<T>(p).run(); });
}

}  // namespace fastdiff::CPU_CAPABILITY
