// The gradient of a 3x3 convolution's weight, of stride 1, by Winograd's minimal filtering
// F(m x m, 3x3) (Lavin & Gray 2016, arXiv:1509.09308). A tile of the convolution is
//
//   y = A^T [(G w G^T) . (B^T x B)] A,   so   dw = G^T [sum over tiles of (A dy A^T) . (B^T x B)]
//   G.
//
// The sums are products of matrices, one for each of the (m + 2)^2 elements of a transformed tile:
// [K, tiles] times [tiles, C], with 1/4 of the direct multiplications for m = 4 and 1/2.25 for m
// = 2.
//
// A block of tiles at a time, channels of x and dy are transformed into planes, and the planes
// multiplied, adding to sums [(m + 2)^2, K, C] that are in the caches; at the end these are
// transformed back. x and dy are read once, dw is written once. Where the sums would not stay in
// the caches, the filters are divided into passes, each of which reads x again. Planes and sums
// move through the shared cache: the more tiles a block has the less often the sums do, until the
// planes are too large.
//
// The images are divided into parts with sums of their own. A thread computes a whole part where
// there are enough of them: its planes then stay in its core's caches. Else all threads compute
// each part together, which takes longer, as each reads planes that the others have written.
//
// Accuracy in float32: as conv2d_winograd.h states it of the convolution, and its bounds.
#include "cpu/kernels/conv2d_weight_gradient.h"
#include "cpu/kernels/conv2d_winograd_tiles.h"
#include "cpu/kernels/dtypes.h"
#include "cpu/kernels/gemm_transposed.h"

namespace fastdiff::CPU_CAPABILITY {
namespace {

template <class T, int m>
struct WinogradWeightGradient {
  static constexpr int r = 3, kTile = m + r - 1, kPlanes = kTile * kTile;
  // That are read and transformed at a time: a pixel's come from neighbouring cache lines.
  static constexpr int64_t kChannels = 4 * kLine;
  // Tiles of a block: at most so many floats in its planes, as long as that makes kLeast tiles.
  static constexpr int64_t kBlock = 3 << 19;
  static constexpr int64_t kLeast = 64, kMost = 256;
  static constexpr int64_t kParts = 8;           // of the images, at most
  static constexpr int64_t kSums = 2 * kShared;  // floats of the sums of all parts, at most

  const ConvWeightGradient p;
  const Conv2d dy;
  const Chunks passes;          // of filters
  const int64_t rows, columns;  // of an image's tiles
  const int64_t x_ld, dy_ld;    // of the transformed x and dy
  const int64_t sums_ld, sums_plane, parts;
  float* products;
  PixelSums sums;

  // Some of the images.
  struct Part {
    const int64_t first;  // image
    const Grid grid;
    const int64_t x_plane, dy_plane;  // of the transformed x and dy
    // Several threads transform the next block while they multiply one, and wait for each other
    // once a block. One alone has no use for that, and its cache for fewer planes.
    const int64_t ahead;
    float *x_planes, *dy_planes, *products;

    Part(const WinogradWeightGradient& w, int64_t number, bool alone)
        : first(w.p.images * number / w.parts),
          grid(make_grid(
              w.p.images * (number + 1) / w.parts - first, w.rows, w.columns,
              std::clamp(kBlock / (kPlanes * (w.p.channels + w.passes.size)), kLeast, kMost))),
          x_plane(odd_lines<float>(grid.largest * w.x_ld)),
          dy_plane(odd_lines<float>(grid.largest * w.dy_ld)),
          ahead(alone ? 0 : 1),
          products(w.products + number * kPlanes * w.sums_plane) {
      static thread_local Scratch x_scratch, dy_scratch;
      x_planes = x_scratch.at_least((ahead + 1) * kPlanes * x_plane + kPanel);
      dy_planes = dy_scratch.at_least((ahead + 1) * kPlanes * dy_plane);
    }

    // The planes of a block, of those that are in memory.
    float* x_of(int64_t block) const { return x_planes + block % (ahead + 1) * kPlanes * x_plane; }
    float* dy_of(int64_t block) const {
      return dy_planes + block % (ahead + 1) * kPlanes * dy_plane;
    }

    // Calls body(segment) for each segment of a block.
    template <class Body>
    void for_segments(int64_t block, Body&& body) const {
      for (int64_t s = grid.blocks[block]; s < grid.blocks[block + 1]; ++s) {
        Segment segment = grid.segments[s];
        segment.image += first;
        body(segment);
      }
    }
  };

  explicit WinogradWeightGradient(const ConvWeightGradient& given)
      : p(given),
        dy(image_of_dy(p)),
        passes(p.filters, std::max(kLine, kShared / (kPlanes * p.channels) / kLine * kLine)),
        rows((p.out_height + m - 1) / m),
        columns((p.out_width + m - 1) / m),
        x_ld(rounded_up(p.channels, kLine) + kLine),
        dy_ld(rounded_up(passes.size, kLine) + kLine),
        sums_ld(rounded_up(p.channels, kLanes)),
        sums_plane(odd_lines<float>(passes.size * sums_ld)),
        parts(count_parts()),
        sums(p.images, p.filters) {
    static thread_local Scratch scratch;
    products = scratch.at_least(parts * kPlanes * sums_plane);
  }

  // By the sizes alone, on which the order of sums may depend.
  int64_t count_parts() const {
    const int64_t tiles = p.images * rows * columns;
    // Tiles of a part at least: else its sums would be much more than its planes.
    const int64_t least =
        std::max<int64_t>(16, 3 * p.filters * p.channels / (4 * (p.filters + p.channels)));
    int64_t count = 1;
    while (2 * count <= std::min(p.images, kParts) && 2 * count * least <= tiles &&
           2 * count * kPlanes * sums_plane <= kSums)
      count *= 2;
    return count;
  }

  void run() {
    const bool alone = p.threads.count == 1 || parts % p.threads.count == 0;
    for (int64_t k0 = 0; k0 < p.filters; k0 += passes.size) {
      const int64_t k1 = std::min(p.filters, k0 + passes.size);
      if (alone) {
        share(p.threads, parts, [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i) {
            const Part part(*this, i, true);
            for (int64_t block = 0; block < part.grid.count(); ++block) {
              for (int64_t unit = 0; unit < transforms(k0, k1); ++unit)
                transform(part, block, k0, k1, unit);
              for (int64_t plane = 0; plane < kPlanes; ++plane)
                multiply(part, block, plane, 0, k1 - k0);
            }
          }
        });
      } else {
        for (int64_t i = 0; i < parts; ++i) compute_together(Part(*this, i, false), k0, k1);
      }
      share(p.threads, k1 - k0, [&](int64_t begin, int64_t end) {
        for (int64_t k = begin; k < end; ++k) transform_back(k, k0 + k);
      });
    }
    sums.store(p.sums, p.images);
  }

  // A part's sums by all threads.
  void compute_together(const Part& part, int64_t k0, int64_t k1) {
    const int64_t all = transforms(k0, k1);
    // Shares of the filters, where planes alone would not keep the threads busy.
    const int64_t shares = std::min((4 * p.threads.count + kPlanes - 1) / kPlanes, chunks(k1 - k0));
    for (int64_t block = 0; block < part.grid.count() + 1; ++block) {
      const int64_t transformed = block < part.grid.count() ? all : 0,
                    multiplied = block > 0 ? kPlanes * shares : 0;
      share(p.threads, transformed + multiplied, [&](int64_t begin, int64_t end) {
        for (int64_t unit = begin; unit < end; ++unit) {
          if (unit < transformed) {
            transform(part, block, k0, k1, unit);
          } else {
            const int64_t product = unit - transformed, at = product % shares;
            multiply(part, block - 1, product / shares, (k1 - k0) * at / shares,
                     (k1 - k0) * (at + 1) / shares);
          }
        }
      });
    }
  }

  static int64_t chunks(int64_t channels) { return (channels + kChannels - 1) / kChannels; }

  // How many units of transforms a block has, and one of them.
  int64_t transforms(int64_t k0, int64_t k1) const { return chunks(p.channels) + chunks(k1 - k0); }

  void transform(const Part& part, int64_t block, int64_t k0, int64_t k1, int64_t unit) {
    const int64_t of_x = chunks(p.channels);
    if (unit < of_x) {
      read_x(part, block, unit * kChannels, std::min(p.channels, (unit + 1) * kChannels));
    } else {
      const int64_t k = k0 + (unit - of_x) * kChannels;
      read_dy(part, block, k0, k, std::min(k1, k + kChannels));
    }
  }

  // Transforms channels begin..end-1 of x, at most kChannels.
  FASTDIFF_ONE_COPY void read_x(const Part& part, int64_t block, int64_t begin, int64_t end) const {
    static thread_local Scratch scratch;
    const int64_t deep = rounded_up(end - begin, kLanes);
    part.for_segments(block, [&](const Segment& segment) {
      const TilePatch<OfInput<m, r>, kChannels> patch(segment);
      float* pixels = scratch.at_least(patch.size());
      patch.template read<T>(p, segment.image, segment.top * m - p.top, segment.left * m - p.left,
                             begin, end, deep, pixels);
      patch.transform(
          pixels, deep,
          Planes<float>{part.x_of(block) + segment.first * x_ld + begin, x_ld, part.x_plane});
    });
  }

  // Transforms filters begin..end-1 of dy, of a pass that begins with filter k0.
  FASTDIFF_ONE_COPY void read_dy(const Part& part, int64_t block, int64_t k0, int64_t begin,
                                 int64_t end) {
    static thread_local Scratch scratch;
    const int64_t deep = rounded_up(end - begin, kLanes);
    part.for_segments(block, [&](const Segment& segment) {
      const TilePatch<OfGradient<m, r>, kChannels> patch(segment);
      float* pixels = scratch.at_least(patch.size());
      patch.template read<T>(dy, segment.image, segment.top * m, segment.left * m, begin, end, deep,
                             pixels);
      sums.add(segment.image, begin, end, pixels, patch.rows * patch.columns, kChannels);
      patch.transform(pixels, deep,
                      Planes<float>{part.dy_of(block) + segment.first * dy_ld + begin - k0, dy_ld,
                                    part.dy_plane});
    });
  }

  // Adds a plane's products to filters begin..end-1 of its sums.
  FASTDIFF_ONE_COPY void multiply(const Part& part, int64_t block, int64_t plane, int64_t begin,
                                  int64_t end) const {
    const Segment& last = part.grid.segments[part.grid.blocks[block + 1] - 1];
    const int64_t tiles = last.first + last.tiles();
    Array<const float*> of_x(tiles), of_dy(tiles);
    for (int64_t t = 0; t < tiles; ++t) {
      of_x.add(part.x_of(block) + t * x_ld);
      of_dy.add(part.dy_of(block) + t * dy_ld);
    }
    multiply_transposed(
        tiles, {of_dy.data(), plane * part.dy_plane + begin}, end - begin,
        {of_x.data(), plane * part.x_plane}, p.channels,
        Into{part.products + plane * sums_plane + begin * sums_ld, sums_ld, block > 0});
  }

  // Filter k of the sums becomes filter `to` of dw.
  FASTDIFF_ONE_COPY void transform_back(int64_t k, int64_t to) const {
    float* dw = p.dw + to * r * r * p.channels;
    for (int64_t c = 0; c < p.channels; c += kLanes) {
      const float* from = products + k * sums_ld + c;
      F columns[r * kTile];
#pragma GCC unroll 6
      for (int q = 0; q < kTile; ++q) {
        F d[kTile];
#pragma GCC unroll 6
        for (int a = 0; a < kTile; ++a) d[a] = load_lanes(from + (a * kTile + q) * sums_plane);
        for (int64_t i = 1; i < parts; ++i)
#pragma GCC unroll 6
          for (int a = 0; a < kTile; ++a)
            d[a] += load_lanes(from + (i * kPlanes + a * kTile + q) * sums_plane);
        Filtering<m, r>::weight_gradient(d, 1, columns + q, kTile);
      }
#pragma GCC unroll 3
      for (int a = 0; a < r; ++a) {
        F taps[r];
        Filtering<m, r>::weight_gradient(columns + a * kTile, 1, taps, 1);
#pragma GCC unroll 3
        for (int q = 0; q < r; ++q)
          store_lanes(dw + (a * r + q) * p.channels + c, taps[q], p.channels - c);
      }
    }
  }
};

template <int m>
void winograd(const ConvWeightGradient& p) {
  for_float_or_bfloat16(p.dtype, [&]<class T>() { WinogradWeightGradient<T, m>(p).run(); });
}

}  // namespace

void conv2d_winograd2_weight_gradient(const ConvWeightGradient& p) { winograd<2>(p); }

void conv2d_winograd4_weight_gradient(const ConvWeightGradient& p) { winograd<4>(p); }

}  // namespace fastdiff::CPU_CAPABILITY
