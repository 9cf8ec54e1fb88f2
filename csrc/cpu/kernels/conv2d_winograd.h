// A 3x3 convolution of stride 1 by Winograd's minimal filtering F(m x m, 3x3) (Lavin & Gray 2016,
// arXiv:1509.09308), m = 2 or 4: 16 products for 4 outputs, or 36 for 16, where the direct way
// takes 9 each.
//
// Of an upsampled image a window has but 2x2 different pixels. So the outputs of even and odd rows
// and columns are four convolutions of the image itself, by kernels whose taps are sums of the 3x3
// one's, and F(4x4, 2x2) takes 25 products for 16 outputs.
//
// Of a block of tiles: the input patch is read once (conv2d_patch.h) and transformed into planes
// [(m + 2)^2, tiles, C]; each plane is multiplied with its plane of the weight; and the products
// are transformed back, a few filters at a time, and written through the epilogue.
//
// Accuracy in float32, relative L2 against float64, for C = 16 / 256 / 2560 channels of zero mean:
// direct 2e-7 / 9e-7 / 3e-6, m = 2 1.6e-7 / 5e-7 / 1.5e-6, m = 4 1.0e-6 / 3e-6 / 1e-5, phases
// 5e-7 / 2e-6 / 2e-6. The bound for m = 4 is 2e-5. Where means are 100 times the deviation, m = 2
// and 4 are as good as direct, which then loses digits itself (tests/ops/test_conv2d.py holds all
// three to this).
#pragma once

#include "cpu/kernels/conv2d_epilogue.h"
#include "cpu/kernels/conv2d_winograd_tiles.h"

namespace fastdiff::CPU_CAPABILITY {

// One of the convolutions that make up the whole: of outputs (row, column) and every kStep further
// ones, whose first window begins at (top, left) of the input.
template <class Element>
struct Phase {
  int64_t number, row, column, top, left;
  const Element* packed;
};

// Elements that the weight of one phase takes when it is packed.
template <int m, int r, class Products>
constexpr int64_t packed_count(const ConvWeight& size) {
  constexpr int kTile = m + r - 1;
  return kTile * kTile * rounded_up(size.channels, Products::kDepth) *
         Products::width(size.filters);
}

// T is the images' type. Products multiplies the planes. It has
//
//   Element         what the transformed input and weight are rounded to
//   kPanel          filters of a panel of the weight
//   kDepth, kHeight what the channels and tiles of a plane are padded to, with zeros and with rows
//                   that may hold anything
//   kChannels       that are read and transformed at a time
//   kTiles          of a block: with more its planes and products leave the cache, with less the
//                   weight is read more often; kManyTiles where that comes from memory
//   width(filters)  columns that so many filters take up in the weight's panels
//   kRows, pack()   how many channels of a panel conv2d_winograd_pack.h writes at a time, and how
//
// and, of the rows of one block, multiply(): one plane times one panel of its weight.
template <class T, int m, int r, class Products>
struct Winograd {
  using Element = typename Products::Element;
  using Phase = CPU_CAPABILITY::Phase<Element>;
  static constexpr int64_t kPanel = Products::kPanel, kChannels = Products::kChannels;
  static constexpr int kTile = m + r - 1, kPlanes = kTile * kTile;
  static constexpr int64_t kStep = r == 2 ? 2 : 1, kPhases = kStep * kStep;
  static constexpr int64_t kWritten = kLineOf<T>;  // filters of a tile that are written together

  const Conv2d p;
  const int64_t height, width;  // outputs of a phase
  const int64_t depth;          // of a row of the transformed input
  const int64_t weight_floats;
  const Grid grid;
  const int64_t ld, plane;  // of the transformed input
  const Division division;
  const int64_t chunk, chunk_ld, product_plane;  // filters at a time, and of the products
  const int64_t channel_chunks, filter_chunks;
  Array<double> partials;

  explicit Winograd(const Conv2d& given)
      : p(at_once(given)),
        height(p.out_height / kStep),
        width(p.out_width / kStep),
        depth(rounded_up(p.channels, Products::kDepth)),
        weight_floats(in_floats(kPhases * kPlanes * p.channels * p.filters)),
        grid(make_grid(p.images, (height + m - 1) / m, (width + m - 1) / m,
                       weight_floats > kShared ? Products::kManyTiles : Products::kTiles)),
        ld(depth + kLineOf<Element>),
        plane(odd_lines<Element>(rounded_up(grid.largest, Products::kHeight) * ld)),
        division(divide(grid, p.filters, weight_floats, in_floats(kPlanes * plane), p.threads.count,
                        kPanel)),
        chunk(division.chunk),
        chunk_ld(chunk),
        product_plane(odd_lines<float>(rounded_up(grid.largest, Products::kHeight) * chunk_ld)),
        channel_chunks((p.channels + kChannels - 1) / kChannels),
        filter_chunks((p.filters + chunk - 1) / chunk),
        partials(p.statistics ? grid.segments.size() * kPhases * 2 * p.filters : 0) {}

  // Elements in floats that take as many bytes.
  static constexpr int64_t in_floats(int64_t count) { return count / (kLineOf<Element> / kLine); }

  // A phase reads the image as it is.
  static Conv2d at_once(Conv2d p) {
    if (r == 2) p.upsample = false;
    return p;
  }

  Phase phase(int64_t number) const {
    const int64_t row = number / kStep, column = number % kStep;
    const auto* packed = static_cast<const Element*>(p.packed);
    if (r == 3) return {number, row, column, -p.top, -p.left, packed};
    // Row 2 i + row has taps at p.top rows above of the upsampled image and at the next two: which
    // two of them are the same pixel depends on whether the first is the lower half of one.
    const int64_t which = ((row - p.top) & 1) * 2 + ((column - p.left) & 1);
    return {number,
            row,
            column,
            (row - p.top) >> 1,
            (column - p.left) >> 1,
            packed + which * packed_count<m, r, Products>(p)};
  }

  void run() {
    if (division.by_block) {
      share(p.threads, grid.count(), [&](int64_t begin, int64_t end) {
        static thread_local Scratch scratch;
        Element* v = scratch.at_least<Element>(kPlanes * plane);
        for (int64_t block = begin; block < end; ++block)
          for (int64_t i = 0; i < kPhases; ++i) {
            read(block, phase(i), 0, channel_chunks, v);
            multiply(block, phase(i), 0, filter_chunks, v);
          }
      });
    } else {
      static thread_local Scratch scratch;
      Element* v = scratch.at_least<Element>(kPlanes * plane);
      // Two units a thread: a core then reads neighbouring cache lines of a pixel together.
      const int64_t units = std::min(channel_chunks, 2 * p.threads.count);
      for (int64_t block = 0; block < grid.count(); ++block)
        for (int64_t i = 0; i < kPhases; ++i) {
          share(p.threads, units, [&](int64_t begin, int64_t end) {
            read(block, phase(i), channel_chunks * begin / units, channel_chunks * end / units, v);
          });
          share(p.threads, filter_chunks,
                [&](int64_t begin, int64_t end) { multiply(block, phase(i), begin, end, v); });
        }
    }
    if (p.statistics)
      join_statistics(p, grid.segments, kPhases, partials.data(), [&](const Segment& segment) {
        return static_cast<double>((std::min(segment.bottom * m, height) - segment.top * m) *
                                   (std::min(segment.right * m, width) - segment.left * m));
      });
  }

  // Transforms chunks begin..end of the input channels of a block into v.
  void read(int64_t block, const Phase& phase, int64_t begin, int64_t end, Element* v) const {
    static thread_local Scratch scratch;
    for (int64_t s = grid.blocks[block]; s < grid.blocks[block + 1]; ++s) {
      const Segment& segment = grid.segments[s];
      const TilePatch<OfInput<m, r>, kChannels> patch(segment);
      float* pixels = scratch.at_least(patch.size());
      for (int64_t index = begin; index < end; ++index) {
        const int64_t c0 = index * kChannels, c1 = std::min(p.channels, c0 + kChannels);
        const int64_t deep = rounded_up(c1 - c0, Products::kDepth);
        patch.template read<T>(p, segment.image, segment.top * m + phase.top,
                               segment.left * m + phase.left, c0, c1, deep, pixels);
        patch.transform(pixels, deep, Planes<Element>{v + segment.first * ld + c0, ld, plane});
      }
    }
  }

  // Filters k and further ones of the weight's plane a.
  const Element* panel(const Phase& phase, int64_t k, int64_t a) const {
    return phase.packed +
           (k * kPlanes + a * Products::width(std::min(kPanel, p.filters - k))) * depth;
  }

  // Computes and writes chunks begin..end-1 of a block's filters: the products of the planes, then
  // their transform back.
  void multiply(int64_t block, const Phase& phase, int64_t begin, int64_t end, const Element* v) {
    static thread_local Scratch scratch;
    float* products = scratch.at_least(kPlanes * product_plane);
    const Segment& last = grid.segments[grid.blocks[block + 1] - 1];
    const Products multiplier(v, last.first + last.tiles(), ld, depth);
    for (int64_t index = begin; index < end; ++index) {
      const int64_t k0 = index * chunk, k1 = std::min(p.filters, k0 + chunk);
      for (int64_t a = 0; a < kPlanes; ++a) {
        const Element* following = v + (a + 1) % kPlanes * plane;
        for (int64_t k = k0; k < k1; k += kPanel) {
          const Element* next = k + kPanel < k1   ? panel(phase, k + kPanel, a)
                                : a + 1 < kPlanes ? panel(phase, k0, a + 1)
                                                  : panel(phase, k1, 0);
          multiplier.multiply(a * plane, panel(phase, k, a), std::min(kPanel, k1 - k),
                              {next, following + (k - k0) * depth},
                              products + a * product_plane + k - k0, chunk_ld);
        }
      }
      for (int64_t s = grid.blocks[block]; s < grid.blocks[block + 1]; ++s)
        for (int64_t k = k0; k < k1; k += kWritten) {
          if (p.statistics) {
            write<true>(s, phase, k, std::min(k + kWritten, k1), products + k - k0);
          } else {
            write<false>(s, phase, k, std::min(k + kWritten, k1), products + k - k0);
          }
        }
    }
  }

  // Filters k..end of a segment, at most kWritten.
  template <bool kStatistics>
  void write(int64_t s, const Phase& phase, int64_t k, int64_t end, const float* products) {
    const Segment& segment = grid.segments[s];
    Epilogues<T, kStatistics, kWritten> epilogues(p, segment.image, k, end);
    const float* from = products + segment.first * chunk_ld;
    // Copies, since y might be p's memory.
    const int64_t across = kStep, down = kStep * p.out_width;  // to the next pixel of the phase
    const int64_t first = (segment.image * p.out_height + phase.row) * p.out_width + phase.column;
    for (int64_t i = segment.top; i < segment.bottom; ++i)
      for (int64_t j = segment.left; j < segment.right; ++j, from += chunk_ld) {
        const int64_t pixel = first + i * m * down + j * m * across;
        const int64_t rows = std::min<int64_t>(m, height - i * m),
                      columns = std::min<int64_t>(m, width - j * m);
        if (j + 1 < segment.right)  // the next tile's lines, while this one is computed
          for (int a = 0; a < m; ++a)
            for (int q = 0; q < m; ++q) epilogues.prefetch(pixel + a * down + (m + q) * across);
        for (int64_t v = 0; v < epilogues.vectors; ++v) {
          F out[m * m];
          transform_output(from + v * kLanes, out);
          auto& epilogue = epilogues[v];
          epilogue.expect(rows * columns, pixel, out[0]);
          Sums sums{epilogue.first};
          if (rows == m && columns == m) {
            epilogue.template write_tile<m>(pixel, down, across, out, sums);
          } else {
            for (int64_t a = 0; a < rows; ++a)
              for (int64_t q = 0; q < columns; ++q)
                epilogue.write(pixel + a * down + q * across, out[a * m + q], sums);
          }
          epilogue.include(sums);
        }
      }
    if (kStatistics)
      epilogues.finish(partials.data() + (s * kPhases + phase.number) * 2 * p.filters + k);
  }

  FASTDIFF_INLINE void transform_output(const float* from, F* out) const {
    F columns[m * kTile];
#pragma GCC unroll 6
    for (int q = 0; q < kTile; ++q) {
      F d[kTile];
#pragma GCC unroll 6
      for (int a = 0; a < kTile; ++a) d[a] = load_lanes(from + (a * kTile + q) * product_plane);
      Filtering<m, r>::output(d, 1, columns + q, kTile);
    }
#pragma GCC unroll 6
    for (int a = 0; a < m; ++a) Filtering<m, r>::output(columns + a * kTile, 1, out + a * m, 1);
  }
};

}  // namespace fastdiff::CPU_CAPABILITY
