// The gradient of any convolution's weight as products of matrices: for each tap, dy^T [K, pixels]
// times the pixels that the tap multiplies, [pixels, C].
//
// dw is divided into chunks of filters and channels whose sums stay in a core's own cache. Each is
// computed by one thread, which walks over the images: it reads its channels of x (conv2d_patch.h)
// and its filters of dy a block of pixels at a time. So dw is written once, however large it is, x
// is read once for each chunk of filters, dy once for each chunk of channels, and no thread waits
// for another. Where dw makes but few chunks the images are divided too, into splits whose sums are
// added up at the end; how many splits depends on the sizes alone, for it shows in the last bits.
//
// A window of the patch is kernel_h runs of kernel_w * channels floats, as in conv2d_direct.h, and
// a run is multiplied at once: with few channels, vectors span its taps. Where they would still be
// mostly empty, it is the transpose of dw that is summed up, in vectors of filters.
#include "cpu/kernels/conv2d_weight_gradient.h"
#include "cpu/kernels/dtypes.h"
#include "cpu/kernels/gemm_transposed.h"

namespace fastdiff::CPU_CAPABILITY {
namespace {

template <class T>
struct DirectWeightGradient {
  static constexpr int64_t kPixels = 192;    // of a block
  static constexpr int64_t kChannels = 256;  // of a chunk at most

  const ConvWeightGradient p;
  const Conv2d dy;
  const Grid grid;
  const Chunks channels, filters;
  const int64_t splits;
  const int64_t dw_size;
  const int64_t dy_ld;  // of a pixel of a block's dy
  float* of_splits;     // like dw each; one alone is dw itself
  PixelSums sums;

  explicit DirectWeightGradient(const ConvWeightGradient& given)
      : p(in_lines(given)),
        dy(image_of_dy(p)),
        grid(make_grid(p.images, p.out_height, p.out_width, kPixels)),
        channels(p.channels, most_channels(p)),
        filters(p.filters, most_filters(p, channels.size)),
        splits(splits_of_images(p, channels.count * filters.count)),
        dw_size(p.filters * p.kernel_h * p.kernel_w * p.channels),
        dy_ld(rounded_up(filters.size, kLine) + kLine),
        sums(p.images, p.filters) {}

  // Channels of a chunk: with so many filters the cache has room for it.
  static int64_t most_channels(const Conv2d& p) {
    const int64_t fit = kPrivate / (p.kernel_h * p.kernel_w * std::min(kChannels, p.filters));
    return std::clamp(fit / kPanel * kPanel, kPanel, kChannels);
  }

  // Filters of a chunk of so many channels.
  static int64_t most_filters(const Conv2d& p, int64_t channels) {
    const int64_t fit = kPrivate / (p.kernel_h * p.kernel_w * channels);
    return std::max(kLine, fit / kLine * kLine);
  }

  // Enough for kUnits units, unless their sums would take too much memory.
  static int64_t splits_of_images(const Conv2d& p, int64_t chunks) {
    constexpr int64_t kUnits = 8, kFloats = 1 << 20;
    const int64_t size = p.filters * p.kernel_h * p.kernel_w * p.channels;
    return std::clamp<int64_t>(std::min(kUnits / chunks, kFloats / size), 1, p.images);
  }

  // The first block of a split: that of its first image, or the next one.
  int64_t first_block(int64_t split) const {
    int64_t block = 0;
    while (block < grid.count() &&
           grid.segments[grid.blocks[block]].image < p.images * split / splits)
      ++block;
    return block;
  }

  void run() {
    static thread_local Scratch scratch;
    of_splits = splits > 1 ? scratch.at_least(splits * dw_size) : p.dw;
    // Filters of a unit: fewer than of a chunk where threads would have nothing to do.
    const int64_t busy = p.filters * channels.count * splits / (2 * p.threads.count);
    const Chunks parts(p.filters, std::clamp(busy, std::min(kLine, filters.size), filters.size));
    const int64_t chunks = parts.count * channels.count;
    share(p.threads, splits * chunks, [&](int64_t begin, int64_t end) {
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t chunk = unit % chunks, k0 = chunk / channels.count * parts.size,
                      c0 = chunk % channels.count * channels.size;
        compute(unit / chunks, k0, std::min(p.filters, k0 + parts.size), c0,
                std::min(p.channels, c0 + channels.size));
      }
    });
    if (splits > 1)
      share(p.threads, p.filters, [&](int64_t begin, int64_t end) { join(begin, end); });
    sums.store(p.sums, p.images);
  }

  // dw of filters begin..end-1: the splits' sums.
  FASTDIFF_ONE_COPY void join(int64_t begin, int64_t end) const {
    const int64_t filter = dw_size / p.filters;
    for (int64_t i = begin * filter; i < end * filter; i += kLanes) {
      const int64_t lanes = std::min(kLanes, end * filter - i);
      F sum = load_lanes(of_splits + i, lanes);
      for (int64_t split = 1; split < splits; ++split)
        sum += load_lanes(of_splits + split * dw_size + i, lanes);
      store_lanes(p.dw + i, sum, lanes);
    }
  }

  // What a split of the images adds to filters k0..k1-1 and channels c0..c1-1 of dw.
  FASTDIFF_ONE_COPY void compute(int64_t split, int64_t k0, int64_t k1, int64_t c0, int64_t c1) {
    static thread_local Scratch x_scratch, dy_scratch, dw_scratch;
    const int64_t count = k1 - k0, deep = c1 - c0, run = p.kernel_w * deep;
    const auto vectors = [](int64_t numbers) { return (numbers + kLanes - 1) / kLanes; };
    const bool transposed = run * vectors(count) < count * vectors(run);
    const int64_t height_of_sums = transposed ? run : count,
                  ld = vectors(transposed ? count : run) * kLanes;
    float* dw = dw_scratch.at_least(p.kernel_h * height_of_sums * ld);
    const int64_t begin = first_block(split), end = first_block(split + 1);
    if (begin == end) std::memset(dw, 0, p.kernel_h * height_of_sums * ld * sizeof(float));
    float* of_dy = dy_scratch.at_least(grid.largest * dy_ld + kPanel);
    Array<const float*> windows(grid.largest), pixels_of_dy(grid.largest);
    for (int64_t t = 0; t < grid.largest; ++t) pixels_of_dy.add(of_dy + t * dy_ld);
    for (int64_t block = begin; block < end; ++block) {
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
      const Rows b{pixels_of_dy.data(), 0};
      for (int64_t r = 0; r < p.kernel_h; ++r) {
        const Rows a{windows.data(), r * width * deep};
        const Into into{dw + r * height_of_sums * ld, ld, block > begin};
        if (transposed) {
          multiply_transposed(windows.size(), a, run, b, count, into);
        } else {
          multiply_transposed(windows.size(), b, count, a, run, into);
        }
      }
    }
    float* out = of_splits + split * dw_size;
    for (int64_t k = 0; k < count; ++k)
      for (int64_t r = 0; r < p.kernel_h; ++r) {
        const float* from = dw + r * height_of_sums * ld + k * (transposed ? 1 : ld);
        for (int64_t s = 0; s < p.kernel_w; ++s) {
          float* to = out + (((k0 + k) * p.kernel_h + r) * p.kernel_w + s) * p.channels + c0;
          if (transposed) {
            for (int64_t c = 0; c < deep; ++c) to[c] = from[(s * deep + c) * ld];
          } else {
            std::memcpy(to, from + s * deep, deep * sizeof(float));
          }
        }
      }
  }
};

}  // namespace

void conv2d_direct_weight_gradient(const ConvWeightGradient& p) {
  for_float_or_bfloat16(p.dtype, [&]<class T>() { DirectWeightGradient<T>(p).run(); });
}

}  // namespace fastdiff::CPU_CAPABILITY
