// A convolution of any kernel and stride as one product. The rows of A are the pixels' windows. A
// window is R runs of S * C floats in the patch (conv2d_patch.h), and is never copied. A 1x1
// convolution of float32 pixels that nothing is applied to reads them where they are.
//
// `Product` multiplies: Windows here, or Sevenths of conv2d_strassen.cpp.
#pragma once

#include "cpu/kernels/conv2d_epilogue.h"
#include "cpu/kernels/conv2d_grid.h"
#include "cpu/kernels/conv2d_patch.h"
#include "cpu/kernels/dtypes.h"
#include "cpu/kernels/gemm.h"
#include "cpu/kernels/memory.h"

namespace fastdiff::CPU_CAPABILITY {

// Rows of A are windows, each of several runs that are `row` floats apart.
struct Windows {
  static constexpr int64_t kColumns = kPanel;

  static int64_t pixels(const Conv2d&) { return 96; }  // of a block

  static int64_t packed(int64_t depth, int64_t filters) { return depth * packed_columns(filters); }

  const int64_t runs, run;

  explicit Windows(const Conv2d& p) : runs(p.kernel_h), run(p.kernel_w * p.channels) {}

  void complete(Array<const float*>&) const {}

  void multiply(const Array<const float*>& rows, int64_t row, const float* packed, int64_t k,
                int64_t columns, float* c, int64_t ld) const {
    const float* b = packed + k * runs * run;
    for (int64_t r = 0; r < runs; ++r)
      for (int64_t d = 0; d < run; d += kDepth) {
        const int64_t deep = std::min(kDepth, run - d);
        const float* next = b + deep * packed_columns(columns);
        multiply_panel(rows.size(), rows.data(), r * row + d, deep, b, columns, {next},
                       Into{c, ld, r + d > 0});
        b = next;
      }
  }
};

template <class T, class Product>
struct Direct {
  static constexpr int64_t kMost = largest_chunk(Product::kColumns);  // channels of a chunk

  const Conv2d p;
  const bool in_place;
  const Product product;
  const Grid grid;
  const int64_t gates, outputs;  // 2 filters for each channel of y, or 1
  const Division division;
  const int64_t chunk, chunk_ld, chunks;  // of y's channels
  Array<double> partials;

  explicit Direct(const Conv2d& given)
      : p(in_lines(given)),
        in_place(pointwise(p) && !p.skip && !p.norm && !p.silu && std::is_same_v<T, float>),
        product(p),
        grid(make_grid(p.images, p.out_height, p.out_width, Product::pixels(p))),
        gates(p.gated ? 2 : 1),
        outputs(p.filters / gates),
        division(divide(grid, outputs,
                        Product::packed(p.kernel_h * p.kernel_w * p.channels, p.filters),
                        grid.largest * p.channels, p.threads.count, Product::kColumns)),
        chunk(division.chunk),
        chunk_ld(gates * chunk + kLine),
        chunks((outputs + chunk - 1) / chunk),
        partials(p.statistics ? grid.segments.size() * 2 * p.filters : 0) {}

  void run() {
    if (division.by_block) {
      share(p.threads, grid.count(), [&](int64_t begin, int64_t end) {
        for (int64_t block = begin; block < end; ++block) {
          const auto rows = read(block);
          multiply(block, 0, chunks, rows);
        }
      });
    } else {
      for (int64_t block = 0; block < grid.count(); ++block) {
        const auto rows = read(block);
        share(p.threads, chunks,
              [&](int64_t begin, int64_t end) { multiply(block, begin, end, rows); });
      }
    }
    if (p.statistics)
      join_statistics(p, grid.segments, 1, partials.data(),
                      [](const Segment& segment) { return static_cast<double>(segment.tiles()); });
  }

  int64_t patch_width(const Segment& segment) const {
    return (segment.width() - 1) * p.stride_w + p.kernel_w;
  }

  // Reads a block's patches, and returns where the window of each of its pixels begins.
  Array<const float*> read(int64_t block) const {
    static thread_local Scratch scratch;
    Array<const float*> rows(2 * grid.largest);
    const int64_t begin = grid.blocks[block], end = grid.blocks[block + 1];
    const auto patch_height = [&](const Segment& segment) {
      return (segment.bottom - segment.top - 1) * p.stride_h + p.kernel_h;
    };
    float* patch = nullptr;
    if (!in_place) {
      const Segment& first = grid.segments[begin];  // the others of its block are like it
      patch =
          scratch.at_least((end - begin) * patch_height(first) * patch_width(first) * p.channels);
    }
    for (int64_t s = begin; s < end; ++s) {
      const Segment& segment = grid.segments[s];
      if (in_place) {
        const float* line = static_cast<const float*>(p.x) + segment.image * p.width * p.x_ld;
        for (int64_t j = segment.left; j < segment.right; ++j) rows.add(line + j * p.x_ld);
        continue;
      }
      const int64_t height = patch_height(segment), width = patch_width(segment);
      read_patch<T>(p, segment.image, segment.top * p.stride_h - p.top,
                    segment.left * p.stride_w - p.left, height, width, 0, p.channels, patch,
                    p.channels);
      for (int64_t i = 0; i < segment.bottom - segment.top; ++i)
        for (int64_t j = 0; j < segment.width(); ++j)
          rows.add(patch + (i * p.stride_h * width + j * p.stride_w) * p.channels);
      patch += height * width * p.channels;
    }
    product.complete(rows);
    return rows;
  }

  // Chunks begin..end of y's channels of a block.
  void multiply(int64_t block, int64_t begin, int64_t end, const Array<const float*>& rows) {
    static thread_local Scratch scratch;
    float* products = scratch.at_least((grid.largest + 1) * chunk_ld);
    const auto* packed = static_cast<const float*>(p.packed);
    const int64_t first = grid.blocks[block];
    const int64_t row = patch_width(grid.segments[first]) * p.channels;
    for (int64_t index = begin; index < end; ++index) {
      const int64_t k0 = index * chunk, k1 = std::min(outputs, k0 + chunk);
      for (int64_t gate = 0; gate < gates; ++gate)
        for (int64_t k = k0; k < k1; k += Product::kColumns)
          product.multiply(rows, row, packed, gate * outputs + k,
                           std::min(Product::kColumns, k1 - k),
                           products + gate * (k1 - k0) + k - k0, chunk_ld);
      for (int64_t s = first; s < grid.blocks[block + 1]; ++s) {
        const Segment& segment = grid.segments[s];
        if (p.gated) {
          Gated<T, kMost> gated(p, k0, k1);
          write(segment, products, gated);
        } else if (p.statistics) {
          Epilogues<T, true, kMost> epilogues(p, segment.image, k0, k1);
          write(segment, products, epilogues);
          epilogues.finish(partials.data() + s * 2 * p.filters + k0);
        } else {
          Epilogues<T, false, kMost> epilogues(p, segment.image, k0, k1);
          write(segment, products, epilogues);
        }
      }
    }
  }

  // Writes a chunk of a segment. All channels of a run of pixels are written before the next run's,
  // since where filters are many each pixel is in pages of its own.
  template <class Epilogues>
  void write(const Segment& segment, const float* products, Epilogues& epilogues) {
    const float* from = products + segment.first * chunk_ld;
    const int64_t out_height = p.out_height, out_width = p.out_width;  // y might be p's memory
    for (int64_t i = segment.top; i < segment.bottom; ++i) {
      const int64_t line = (segment.image * out_height + i) * out_width;
      for (int64_t j = segment.left, end; j < segment.right; j = end) {
        end = std::min(j + kRun, segment.right);
        epilogues.write_run(line + j, end - j, from, chunk_ld);
        from += (end - j) * chunk_ld;
      }
    }
  }
};

template <class Product>
void direct(const Conv2d& p) {
  for_float_or_bfloat16(p.dtype, [&]<class T>() { Direct<T, Product>(p).run(); });
}

}  // namespace fastdiff::CPU_CAPABILITY
