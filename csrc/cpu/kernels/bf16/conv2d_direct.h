// A convolution of any kernel and stride as one product of bfloat16 with sums in float32. Rows of A
// are the pixels of a patch (conv2d_patch.h), and the steps of a plane of 32 channels are the taps
// of the kernel: they read the same few KiB of the patch from L1, while the weight streams from L2.
//
// Of a block all pixels are multiplied with a slice of a panel's weight, of kSliceBytes, before the
// next slice is; meanwhile that is fetched into L2. Sums are kept in memory between the slices.
#pragma once

#include "cpu/kernels/bf16/conv2d_pack.h"
#include "cpu/kernels/bf16/conv2d_patch.h"
#include "cpu/kernels/conv2d_direct.h"
#include "cpu/kernels/conv2d_epilogue.h"
#include "cpu/kernels/memory.h"

namespace fastdiff::CPU_CAPABILITY {

// Values of bfloat16 as they are, or each value of float32 as a sum of two, in three products: what
// is left out, the product of both remainders, is 2^-18 of the whole.
template <int kParts>
struct Steps {
  static constexpr int64_t kProducts = kParts == 1 ? 1 : 3;
  static constexpr int64_t kBytes = kParts * kStepBytes;  // of the weight, a tap and plane

  Array<int64_t> tap, step;

  template <class Patch>
  explicit Steps(const Conv2d& p, const Patch& patch) {
    for (int64_t r = 0; r < p.kernel_h; ++r)
      for (int64_t s = 0; s < p.kernel_w; ++s) {
        const int64_t at = patch.tap(r, s), weight = (r * p.kernel_w + s) * kBytes;
        if constexpr (kParts > 1) {
          add(at + patch.part_bytes, weight);
          add(at, weight);
          add(at, weight + kStepBytes);
        } else {
          add(at, weight);
        }
      }
  }

  void add(int64_t of_patch, int64_t of_weight) {
    tap.add(of_patch);
    step.add(of_weight);
  }
};

// Which outputs of the whole a convolution computes: those of rows row + i * step, and columns
// column + j * step. It is number `number` of `count`.
struct Outputs {
  int64_t number = 0, count = 1, row = 0, column = 0, step = 1;
};

template <class T, int kParts>
struct DirectBf16 {
#ifdef FASTDIFF_TILES
  static constexpr int64_t kPatchBytes = 384 << 10, kManyBytes = 1 << 20;  // of a block's patch
  static constexpr int64_t kPointwiseSlice = 40 << 10;
#else
  static constexpr int64_t kPatchBytes = 256 << 10, kManyBytes = 512 << 10;
  static constexpr int64_t kPointwiseSlice = 20 << 10;
#endif
  static constexpr int64_t kSliceBytes = 108 << 10;
  static constexpr int64_t kLeastBlocks = 8;   // of many pixels
  static constexpr int64_t kHeavy = 16 << 20;  // bytes of a weight that is better read once
  // A 1x1 convolution's blocks are of fewer pixels, since each panel writes a line of 64 bytes of
  // each of them, in as many pages; but of enough to multiply each value of the weight with.
  static constexpr int64_t kPointwiseBytes = 96 << 10, kPointwisePixels = 128;

  // 16 neighbouring outputs of a segment, or those that are left.
  struct Group {
    int64_t segment, pixel, count;
    const char* at;
  };

  const Conv2d p;
  const Outputs phase;
  const int64_t taps, planes, plane_steps;  // bytes of the weight a plane
  const int64_t gates, outputs, panels;     // panels of y's channels
  const bool in_place;                      // whether pixels are multiplied where they are
  const Grid grid;
  const Division division;
  double* const partials;  // of all phases' statistics, [segments, phases, 2, K]; or null

  // `partials` makes room for that many, where there are statistics.
  DirectBf16(const Conv2d& given, Array<double>& partials, const Outputs& phase = {})
      : p(in_lines(given)),
        phase(phase),
        taps(p.kernel_h * p.kernel_w),
        planes((p.channels + kColumns - 1) / kColumns),
        plane_steps(taps * Steps<kParts>::kBytes),
        gates(p.gated ? 2 : 1),
        outputs(p.filters / gates),
        panels((outputs + kColumns - 1) / kColumns),
        in_place(reads_in_place()),
        grid(make_blocks()),
        division(divide(grid, outputs, gates * panels * planes * plane_steps / 4,
                        grid.largest * planes * kColumns / 2, p.threads.count, kColumns)),
        partials(room(partials)) {}

  double* room(Array<double>& partials) const {
    if (!p.statistics) return nullptr;
    partials.reserve(grid.segments.size() * phase.count * 2 * p.filters);
    return partials.data();
  }

  // Where nothing is applied to the pixels of a 1x1 convolution: unless tiles would read behind the
  // last one, or pixels are whole pages apart, so that their lines push each other out of L1.
  bool reads_in_place() const {
    constexpr int64_t kPage = 4096;
    if (!std::is_same_v<T, bf16> || !pointwise(p) || p.skip || p.norm || p.silu) return false;
#ifdef FASTDIFF_TILES
    if (p.out_width % kGroup != 0) return false;
#endif
    return p.channels % kColumns == 0 && p.x_ld * int64_t{sizeof(T)} % kPage != 0;
  }

  // A line of a 1x1 convolution, a whole image, is divided between groups.
  Grid make_blocks() const {
    const int64_t target = block_pixels();
    if (!pointwise(p)) return make_grid(p.images, p.out_height, p.out_width, target);
    Grid grid = make_grid(p.images, 1, (p.out_width + kGroup - 1) / kGroup, target / kGroup);
    for (int64_t s = 0; s < grid.segments.size(); ++s) {
      Segment& segment = grid.segments[s];
      segment.left *= kGroup, segment.first *= kGroup;
      segment.right = std::min(segment.right * kGroup, p.out_width);
    }
    grid.largest *= kGroup;
    return grid;
  }

  int64_t block_pixels() const {
    const int64_t weight = gates * panels * planes * plane_steps;
    const int64_t most = weight > kHeavy ? kManyBytes : kPatchBytes;
    const int64_t each = planes * 64 * kParts * p.stride_h * p.stride_w *
                         (p.out_width % kGroup == 0 ? 1 : p.kernel_w);
    const int64_t pixels = p.images * p.out_height * p.out_width;
    // Several blocks, however many threads there are: sums must not depend on that.
    const int64_t share = std::max<int64_t>(pixels / kLeastBlocks, 4 * kTogetherRows);
    const int64_t fit =
        taps > 1 ? most / each
                 : std::max(kPointwiseBytes / each, std::min(kPointwisePixels, kManyBytes / each));
    return std::max<int64_t>(kTogetherRows, std::min(fit, share) / kGroup * kGroup);
  }

  void run() {
    if (division.by_block) {
      share(p.threads, grid.count(), [&](int64_t begin, int64_t end) {
        const Tiles tiles;
        for (int64_t block = begin; block < end; ++block) {
          char* patch = in_place ? nullptr : patch_memory(block);
          if (!in_place) read(block, 0, units(block), patch);
          multiply(block, 0, panels, patch);
        }
      });
    } else {
      const int64_t each = std::max<int64_t>(1, division.chunk / kColumns);
      for (int64_t block = 0; block < grid.count(); ++block) {
        char* patch = in_place ? nullptr : patch_memory(block);
        if (!in_place)
          share(p.threads, units(block),
                [&](int64_t begin, int64_t end) { read(block, begin, end, patch); });
        share(p.threads, (panels + each - 1) / each, [&](int64_t begin, int64_t end) {
          const Tiles tiles;
          multiply(block, begin * each, std::min(panels, end * each), patch);
        });
      }
    }
  }

  // After all phases have run.
  void join() const {
    if (p.statistics)
      join_statistics(p, grid.segments, phase.count, partials,
                      [](const Segment& segment) { return static_cast<double>(segment.tiles()); });
  }

  using PatchOf = Patch<T, kParts>;

  // The others of a block's segments are like its first.
  PatchOf patch_of(int64_t block) const { return {p, grid.segments[grid.blocks[block]]}; }

  int64_t segments_of(int64_t block) const { return grid.blocks[block + 1] - grid.blocks[block]; }

  // Of reading a block: rows of its patches, in order.
  int64_t units(int64_t block) const { return segments_of(block) * patch_of(block).rows; }

  char* patch_memory(int64_t block) const {
    static thread_local Scratch scratch;
    return scratch.at_least<char>(segments_of(block) * patch_of(block).bytes() + PatchOf::kBehind);
  }

  void read(int64_t block, int64_t begin, int64_t end, char* memory) const {
    const PatchOf patch = patch_of(block);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t s = unit / patch.rows;
      patch.read(grid.segments[grid.blocks[block] + s], unit % patch.rows,
                 memory + s * patch.bytes());
    }
  }

  // Panels begin..end of a block.
  void multiply(int64_t block, int64_t begin, int64_t end, const char* memory) {
    static thread_local Scratch scratch;
    const PatchOf patch = patch_of(block);
    const Steps<kParts> steps(p, patch);
    Walk walk{in_place ? p.x_ld * int64_t{sizeof(T)} : patch.spacing(),
              in_place ? kColumns * int64_t{sizeof(T)} : patch.plane_bytes,
              taps * Steps<kParts>::kProducts,
              steps.tap.data(),
              kParts > 1 ? steps.step.data() : nullptr,
              plane_steps};
    Array<Group> groups;
    for (int64_t s = 0; s < segments_of(block); ++s) {
      const Segment& segment = grid.segments[grid.blocks[block] + s];
      for (int64_t pixel = 0; pixel < segment.tiles(); pixel += kGroup)
        groups.add({grid.blocks[block] + s, pixel, std::min(kGroup, segment.tiles() - pixel),
                    in_place ? static_cast<const char*>(p.x) +
                                   (segment.image * p.width + segment.left + pixel) * walk.spacing
                             : memory + s * patch.bytes() + patch.at(pixel)});
    }
    const int64_t pairs = (groups.size() + 1) / 2;
    const int64_t deep =
        std::max<int64_t>(1, (taps > 1 ? kSliceBytes : kPointwiseSlice) / plane_steps);
    const int64_t slices = (planes + deep - 1) / deep, ld = gates * kColumns;
    // One pair's sums, or, between slices, all of them.
    float* sums = scratch.at_least((slices > 1 ? pairs : 1) * kTogetherRows * ld);
    for (int64_t panel = begin; panel < end; ++panel) {
      const auto compute = [&](auto& writer) {
        for (int64_t slice = 0; slice < slices; ++slice) {
          const int64_t first = planes * slice / slices, last = planes * (slice + 1) / slices;
          walk.last_pairs = last < planes ? 16 : pairs_of_last_plane(p.channels);
          for (int64_t pair = 0; pair < pairs; ++pair) {
            const Group& one = groups[2 * pair];
            const bool two = 2 * pair + 1 < groups.size();
            const Group& other = groups[2 * pair + two];
            const Rows rows{one.at + first * walk.plane, other.at + first * walk.plane,
                            two ? kGroup + other.count : one.count};
            float* c = sums + (slices > 1 ? pair : 0) * kTogetherRows * ld;
            for (int64_t gate = 0; gate < gates; ++gate) {
              const char* b = static_cast<const char*>(p.packed) +
                              ((gate * panels + panel) * planes + first) * plane_steps;
              // What is multiplied next, in equal shares.
              const int lines = static_cast<int>((kStepBytes / 64 + pairs - 1) / pairs);
              const int64_t products = (last - first) * walk.taps;
              const Fetch fetch{b + (last - first) * plane_steps + pair * lines * 64 * products,
                                lines};
              CPU_CAPABILITY::multiply(rows, walk, last - first, b, outputs - panel * kColumns,
                                       c + gate * kColumns, ld, slice > 0, fetch);
            }
            if (slice + 1 < slices) continue;
            writer.write(one, c, ld);
            if (two) writer.write(other, c + kGroup * ld, ld);
          }
        }
        writer.finish();
      };
      const int64_t k0 = panel * kColumns, k1 = std::min(outputs, k0 + kColumns);
      if (p.gated) {
        GatedWriter writer{*this, Gated<T, kColumns>(p, k0, k1)};
        compute(writer);
      } else if (p.statistics) {
        Writer<true> writer{*this, k0, k1};
        compute(writer);
      } else {
        Writer<false> writer{*this, k0, k1};
        compute(writer);
      }
    }
  }

  // Writes groups of a panel, in order, through its epilogue.
  template <bool kStatistics>
  struct Writer {
    DirectBf16& direct;
    const int64_t begin, end;  // channels
    std::optional<Epilogues<T, kStatistics, kColumns>> epilogues = {};
    int64_t segment = -1;

    void write(const Group& group, const float* from, int64_t ld) {
      if (group.segment != segment) {
        finish();
        segment = group.segment;
        epilogues.emplace(direct.p, direct.grid.segments[segment].image, begin, end);
      }
      direct.write_runs(group, from, ld, *epilogues);
    }

    void finish() {
      if constexpr (kStatistics)
        if (segment >= 0)
          epilogues->finish(
              direct.partials +
              (segment * direct.phase.count + direct.phase.number) * 2 * direct.p.filters + begin);
    }
  };

  struct GatedWriter {
    DirectBf16& direct;
    Gated<T, kColumns> gated;

    void write(const Group& group, const float* from, int64_t ld) {
      direct.write_runs(group, from, ld, gated);
    }
    void finish() {}
  };

  template <class Epilogues>
  FASTDIFF_INLINE void write_runs(const Group& group, const float* from, int64_t ld,
                                  Epilogues& epilogues) const {
    const Segment& segment = grid.segments[group.segment];
    const int64_t width = segment.width();
    for (int64_t pixel = group.pixel, end = group.pixel + group.count, next; pixel < end;
         pixel = next) {
      const int64_t i = pixel / width, j = pixel % width;
      next = std::min({end, pixel + kRun, (i + 1) * width});
      const int64_t row = (segment.image * p.out_height + segment.top + i) * phase.step + phase.row;
      const int64_t column = (segment.left + j) * phase.step + phase.column;
      epilogues.write_run(row * p.out_width * phase.step + column, next - pixel, from, ld,
                          phase.step);
      from += (next - pixel) * ld;
    }
  }
};

template <class T, int kParts>
void direct_bf16(const Conv2d& p) {
  Array<double> partials;
  DirectBf16<T, kParts> direct(p, partials);
  direct.run();
  direct.join();
}

// A 3x3 convolution of an upsampled image as four of the image itself, by kernels of 2x2 taps that
// are sums of the 3x3 one's (conv2d_phases.h): 16 products where there were 36.
template <class T>
void direct_phases_bf16(const Conv2d& p) {
  constexpr int64_t kStep = 2, kPhases = kStep * kStep;
  Array<double> partials;
  for (int64_t number = 0; number < kPhases; ++number) {
    const Outputs phase{number, kPhases, number / kStep, number % kStep, kStep};
    const int64_t top = phase.row - p.top, left = phase.column - p.left;
    Conv2d one = p;
    one.upsample = false;
    one.kernel_h = one.kernel_w = 2;
    one.out_height = p.out_height / kStep, one.out_width = p.out_width / kStep;
    one.top = -(top >> 1), one.left = -(left >> 1);  // the rest of the patch is behind the image
    const int64_t which = (top & 1) * 2 + (left & 1);
    one.packed = static_cast<const bf16*>(p.packed) + which * packed_values<1>(one);
    DirectBf16<T, 1> direct(one, partials, phase);
    direct.run();
    if (number + 1 == kPhases) direct.join();
  }
}

}  // namespace fastdiff::CPU_CAPABILITY
