// How a convolution's tiles are divided into blocks, and the blocks or a block's channels among the
// threads. A tile is the outputs that are computed together: m x m pixels, or one pixel where the
// convolution is direct.
#pragma once

#include "cpu/kernels/conv2d.h"
#include "cpu/kernels/memory.h"
#include "cpu/kernels/vectors.h"

namespace fastdiff::CPU_CAPABILITY {

// Whether each output is computed from the one pixel at its place.
inline bool pointwise(const Conv2d& p) {
  return p.kernel_h * p.kernel_w * p.stride_h * p.stride_w == 1 && !p.upsample &&
         p.out_height == p.height && p.out_width == p.width;
}

// A convolution, or its gradient, of images that are one line each where it is pointwise.
template <class Convolution>
Convolution in_lines(Convolution p) {
  if (pointwise(p)) {
    p.width = p.out_width = p.height * p.width;
    p.height = p.out_height = 1;
  }
  return p;
}

// A rectangle of one image's tiles. Within their block they are numbered from `first` on.
struct Segment {
  int64_t image, top, bottom, left, right, first;

  int64_t width() const { return right - left; }
  int64_t tiles() const { return (bottom - top) * width(); }
};

// A batch's tiles. Block i has the segments blocks[i] up to blocks[i + 1] - 1.
struct Grid {
  Array<Segment> segments;
  Array<int64_t> blocks;
  int64_t largest = 0;  // tiles of a block at most

  int64_t count() const { return blocks.size() - 1; }
};

// Blocks of about `target` tiles: several whole images, rows of one image, or part of a row.
inline Grid make_grid(int64_t images, int64_t rows, int64_t columns, int64_t target) {
  Grid grid;
  int64_t tiles = 0;
  const auto add = [&](Segment segment) {
    segment.first = tiles;
    tiles += segment.tiles();
    grid.segments.add(segment);
  };
  const auto close = [&] {
    grid.largest = std::max(grid.largest, tiles);
    grid.blocks.add(grid.segments.size());
    tiles = 0;
  };
  const auto segments = [&](int64_t length, int64_t most) { return (length + most - 1) / most; };
  grid.blocks.add(0);
  if (rows * columns * 2 <= target) {
    const int64_t count = segments(images, target / (rows * columns));
    for (int64_t b = 0; b < count; ++b) {
      for (int64_t n = images * b / count; n < images * (b + 1) / count; ++n)
        add({n, 0, rows, 0, columns, 0});
      close();
    }
    return grid;
  }
  const int64_t across = segments(columns, target);
  const int64_t down = segments(rows, std::max<int64_t>(1, target / columns));
  for (int64_t n = 0; n < images; ++n)
    for (int64_t i = 0; i < down; ++i)
      for (int64_t j = 0; j < across; ++j) {
        add({n, rows * i / down, rows * (i + 1) / down, columns * j / across,
             columns * (j + 1) / across, 0});
        close();
      }
  return grid;
}

// How the work is divided: each thread computes whole blocks, or all threads compute chunks of the
// same block. The second way reads the weight once for all threads, which counts where blocks are
// few, and where the weight does not stay in the cache that the threads share.
struct Division {
  bool by_block;
  int64_t chunk;  // filters of a chunk: whole panels, at most largest_chunk(panel)
};

constexpr int64_t kChunk = 64;
constexpr int64_t largest_chunk(int64_t panel) { return std::max(panel, kChunk); }
constexpr int64_t kShared = 8 << 20;    // floats of the cache that threads share, more or less
constexpr int64_t kPrivate = 96 << 10;  // floats of a core's own cache, more or less

// `block_floats` is how much of its block each chunk reads.
inline Division divide(const Grid& grid, int64_t filters, int64_t weight_floats,
                       int64_t block_floats, int64_t threads, int64_t panel) {
  const int64_t blocks = grid.count();
  const bool even = blocks % threads == 0 || blocks >= 4 * threads;
  if (threads == 1 || (even && (weight_floats <= kShared || blocks >= 16 * threads)))
    return {true, largest_chunk(panel)};
  // Where rereading a block is cheap, use small chunks: threads then finish together.
  if (block_floats <= kPrivate) return {false, std::max(panel, kLine)};
  // Else the chunk that gives the busiest thread the fewest filters, the largest if several do.
  int64_t best = panel, least = filters + panel;
  for (int64_t chunk = largest_chunk(panel); chunk >= panel; chunk -= panel) {
    const int64_t chunks = (filters + chunk - 1) / chunk;
    const int64_t most = (chunks + threads - 1) / threads * chunk;
    if (most < least) best = chunk, least = most;
  }
  return {false, best};
}

// body(begin, end) for ranges of 0..units-1, on all threads.
template <class Body>
void share(const Threads& threads, int64_t units, Body&& body) {
  if (threads.count == 1) return body(0, units);
  threads.run(
      units,
      [](void* context, int64_t begin, int64_t end) {
        (*static_cast<std::remove_reference_t<Body>*>(context))(begin, end);
      },
      &body);
}

}  // namespace fastdiff::CPU_CAPABILITY
