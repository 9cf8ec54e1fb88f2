// What the gradient of a convolution's weight sums over, for products of bfloat16: pairs of pixels.
//
// The outputs are divided into segments of one shape. A block has 2 * `pairs` of them, and pixel
// (i, j) of one segment is paired with pixel (i, j) of another. So a tap of the kernel, which is an
// offset of pixels, breaks no pair. A missing segment is zero, and so is dy beyond the outputs.
//
// Pairs of segments are interleaved: a line of a block is [width][pairs], where products read 16
// pairs of pixels in a row. So small images fill them, too.
//
// Both operands are as products.h wants them. dy is A, [32 filters][steps][32][16 pairs of
// pixels][2]: a step is 16 pairs of a line. The patch is B, in planes of 32 channels:
// [rows][remainders of columns by the stride][columns][pairs][32][2], so that for every tap and
// stride the pixels of a line are neighbours.
#pragma once

#include <cstring>

#include "cpu/kernels/bf16/conv2d_patch.h"
#include "cpu/kernels/conv2d_weight_gradient.h"

namespace fastdiff::CPU_CAPABILITY {

class PixelPairs {
 public:
  static constexpr int64_t kPairBytes = PairsOfB::kPair;  // of a plane
  static constexpr int64_t kBehind = kGroup * kPairBytes;

  const ConvWeightGradient& p;
  // Channels that are fewer than what is multiplied at a time: the pixels of a window are gathered,
  // as the channels of a 1x1 kernel.
  const bool gathered;
  const int64_t channels, kernel_h, kernel_w;
  int64_t down, across, height, width;  // segments of an image, and their size
  int64_t segments, pairs, blocks;

  // Blocks of about `target` outputs.
  PixelPairs(const ConvWeightGradient& p, int64_t target)
      : p(p),
        gathered(p.channels < kGroup && p.kernel_h * p.kernel_w > 1 &&
                 p.channels * p.kernel_h * p.kernel_w <= kMostGathered),
        channels(gathered ? p.channels * p.kernel_h * p.kernel_w : p.channels),
        kernel_h(gathered ? 1 : p.kernel_h),
        kernel_w(gathered ? 1 : p.kernel_w),
        step_h_(gathered ? 1 : std::min(p.stride_h, p.kernel_h)),
        step_w_(gathered ? 1 : std::min(p.stride_w, p.kernel_w)) {
    divide(target / 2);
    columns_ = width + (kernel_w - 1) / step_w_;
    rows_ = (height - 1) * step_h_ + kernel_h;
  }

  int64_t planes() const { return (channels + kColumns - 1) / kColumns; }
  int64_t row_bytes() const { return step_w_ * columns_ * pairs * kPairBytes; }
  int64_t plane_bytes() const { return rows_ * row_bytes() + kBehind; }

  // Pairs of pixels of a line, and 16 of them at a time.
  int64_t line() const { return width * pairs; }
  int64_t groups() const { return (line() + kGroup - 1) / kGroup; }
  int64_t steps() const { return groups() * height; }
  int64_t panel_bytes() const { return steps() * kStepBytes; }

  // Where in a plane the first pair of line `i` begins, for a tap.
  int64_t at(int64_t i, int64_t r, int64_t s) const {
    const int64_t column = s % step_w_ * columns_ + s / step_w_;
    return (i * step_h_ + r) * row_bytes() + column * pairs * kPairBytes;
  }

  // A rectangle of outputs, or none.
  struct Segment {
    bool exists;
    int64_t image, top, left;
  };

  // The segments of a block, the first of all pairs before the others.
  Array<Segment> block(int64_t number) const {
    Array<Segment> found(2 * pairs);
    for (int64_t i = number * 2 * pairs; i < (number + 1) * 2 * pairs; ++i)
      found.add(
          {i < segments, i / (down * across), i / across % down * height, i % across * width});
    return found;
  }

  // The output (i, j) of a segment in dy, or null.
  const bf16* dy(const Segment& of, int64_t i, int64_t j) const {
    const int64_t y = of.top + i, x = of.left + j;
    if (!of.exists || y >= p.out_height || x >= p.out_width) return nullptr;
    return static_cast<const bf16*>(p.dy) +
           ((of.image * p.out_height + y) * p.out_width + x) * p.dy_ld;
  }

  // Reads a step of dy, of which neighbours in memory follow each other.
  void read_dy(const Array<Segment>& block, int64_t step, char* to) const {
    const int64_t i = step / groups(), first = step % groups() * kGroup;
    const bf16 *one[kGroup], *other[kGroup];
    int64_t j = first / pairs, which = first % pairs;
    for (int64_t pair = 0; pair < kGroup; ++pair) {
      one[pair] = j < width ? dy(block[which], i, j) : nullptr;
      other[pair] = j < width ? dy(block[which + pairs], i, j) : nullptr;
      if (++which == pairs) which = 0, ++j;
    }
    to += (first / kGroup * height + i) * kStepBytes;
    for (int64_t k = 0; k < rounded_up(p.filters, kColumns); k += kGroup) {
      alignas(64) uint32_t both[kGroup][kGroup];
      const int64_t count = std::clamp<int64_t>(p.filters - k, 0, kGroup);
      for (int64_t pair = 0; pair < kGroup; ++pair) {
        const bf16 zeros[kGroup] = {};
        bf16 tails[2][kGroup] = {};
        const auto read = [&](const bf16* from, bf16* tail) -> const bf16* {
          if (!from || count == 0) return zeros;
          if (count == kGroup) return from + k;
          std::memcpy(tail, from + k, count * sizeof(bf16));
          return tail;
        };
        interleave(read(one[pair], tails[0]), read(other[pair], tails[1]), both[pair]);
      }
      // A pair of bfloat16 has the bytes of a float.
      at::vec::transpose_mxn<float, kGroup, kGroup>(
          reinterpret_cast<const float*>(both), kGroup,
          reinterpret_cast<float*>(to + k / kColumns * panel_bytes() + k % kColumns * 64), kGroup);
    }
  }

  // A patch's rows of each pair of segments.
  int64_t lines() const { return rows_ * pairs; }

  // Reads one of them, of all planes.
  void read_line(const Array<Segment>& block, int64_t line, char* patch) const {
    if (p.norm) {
      if (p.silu) return read_as<true, true>(block, line, patch);
      return read_as<true, false>(block, line, patch);
    }
    if (p.silu) return read_as<false, true>(block, line, patch);
    read_as<false, false>(block, line, patch);
  }

 private:
  static constexpr int64_t kNone = -1;
  static constexpr int64_t kMostGathered = 512;

  static int64_t parts(int64_t whole, int64_t part) { return (whole + part - 1) / part; }

  // Chooses segments, and blocks of about `target` pairs of pixels.
  void divide(int64_t target) {
    // A single line makes a pair of its halves.
    const bool single = p.images * p.out_height == 1;
    across = std::max<int64_t>(parts(p.out_width, target), single ? 2 : 1);
    width = parts(p.out_width, across);
    if (across > 1) width = rounded_up(width, kGroup);
    across = parts(p.out_width, width);
    // As many interleaved pairs as fill 16 pairs of pixels, if there are so many lines.
    const int64_t lines = p.images * p.out_height * across;
    int64_t least = 1;
    while (width * least % kGroup != 0 && 2 * width * least <= target && 4 * least <= lines)
      least *= 2;
    // Few images are cut into as many segments as that takes.
    height = std::clamp<int64_t>(target / (width * least), 1, p.out_height);
    height = std::clamp<int64_t>(lines / (2 * least), 1, height);
    height = parts(p.out_height, parts(p.out_height, height));
    down = parts(p.out_height, height);
    segments = p.images * down * across;
    // Small images: more pairs, in blocks of nearly the same size.
    const int64_t every = parts(segments, 2);
    const int64_t most = rounded_up(std::max<int64_t>(1, target / (height * width)), least);
    pairs = std::min(every, rounded_up(parts(every, parts(every, most)), least));
    blocks = parts(every, pairs);
  }

  // Pixel (y, x) of the padded and upsampled image in x, or kNone if it is padding.
  int64_t input(const Segment& of, int64_t y, int64_t x) const {
    const int up = p.upsample ? 1 : 0;
    y += of.top * p.stride_h - p.top, x += of.left * p.stride_w - p.left;
    if (!of.exists || y < 0 || y >= p.height << up || x < 0 || x >= p.width << up) return kNone;
    return (of.image * p.height + (y >> up)) * p.width + (x >> up);
  }

  // Channels c..c+31 of a pixel: in x or skip, or in `values`.
  template <bool kNorm, bool kSilu>
  FASTDIFF_INLINE const bf16* read_values(const Segment& of, int64_t pixel, int64_t c,
                                          bf16 (&values)[1][kColumns]) const {
    if (pixel == kNone) {
      std::memset(static_cast<void*>(values), 0, sizeof(values));
      return values[0];
    }
    if (!kNorm && !kSilu && c + kColumns <= p.x_channels)
      return static_cast<const bf16*>(p.x) + pixel * p.x_ld + c;
    const float* gain = kNorm ? p.norm + of.image * 2 * p.channels : nullptr;
    read_plane<bf16, kNorm, kSilu>(p, pixel, gain, c, values);
    return values[0];
  }

  template <bool kNorm, bool kSilu>
  FASTDIFF_ONE_COPY void read_as(const Array<Segment>& block, int64_t line, char* patch) const {
    const int64_t row = line / pairs, pair = line % pairs;
    const Segment &one = block[pair], &other = block[pair + pairs];
    char* to = patch + row * row_bytes() + pair * kPairBytes;
    if (gathered) return gather<kNorm, kSilu>(one, other, row, to);
    const int64_t y = row / step_h_ * p.stride_h + row % step_h_;
    for (int64_t remainder = 0; remainder < step_w_; ++remainder)
      for (int64_t column = 0; column < columns_; ++column, to += pairs * kPairBytes) {
        const int64_t x = column * p.stride_w + remainder;
        const int64_t pixel = input(one, y, x), paired = input(other, y, x);
        char* plane = to;
        for (int64_t c = 0; c < p.channels; c += kColumns, plane += plane_bytes()) {
          alignas(64) bf16 values[2][1][kColumns];
          const bf16* a = read_values<kNorm, kSilu>(one, pixel, c, values[0]);
          const bf16* b = read_values<kNorm, kSilu>(other, paired, c, values[1]);
          auto* both = reinterpret_cast<uint32_t*>(plane);
          interleave(a, b, both);
          interleave(a + kGroup, b + kGroup, both + kGroup);
        }
      }
  }

  // Row `row` of outputs: the inputs of its windows are interleaved once, and then copied to each
  // window that they belong to.
  template <bool kNorm, bool kSilu>
  void gather(const Segment& one, const Segment& other, int64_t row, char* to) const {
    static thread_local Scratch scratch;
    const int64_t wide = (width - 1) * p.stride_w + p.kernel_w, run = p.kernel_w * p.channels;
    // What is copied and written in vectors may reach behind the last value.
    const int64_t line = wide * p.channels + kColumns;
    uint32_t* const inputs = scratch.at_least<uint32_t>(p.kernel_h * line);
    for (int64_t r = 0; r < p.kernel_h; ++r)
      for (int64_t x = 0; x < wide; ++x) {
        const int64_t y = row * p.stride_h + r;
        alignas(64) bf16 values[2][1][kColumns];
        const bf16* a = read_values<kNorm, kSilu>(one, input(one, y, x), 0, values[0]);
        const bf16* b = read_values<kNorm, kSilu>(other, input(other, y, x), 0, values[1]);
        interleave(a, b, inputs + r * line + x * p.channels);
      }
    alignas(64) uint32_t window[kMostGathered + kColumns] = {};
    for (int64_t j = 0; j < width; ++j, to += pairs * kPairBytes) {
      for (int64_t r = 0; r < p.kernel_h; ++r)
        for (int64_t i = 0; i < run; i += kGroup)
          std::memcpy(window + r * run + i, inputs + r * line + j * p.stride_w * p.channels + i,
                      kGroup * 4);
      std::memset(window + channels, 0, kColumns * 4);
      char* plane = to;
      for (int64_t c = 0; c < channels; c += kColumns, plane += plane_bytes())
        std::memcpy(plane, window + c, kPairBytes);
    }
  }

  const int64_t step_h_, step_w_;
  int64_t rows_, columns_;  // of a patch: columns of each remainder
};

}  // namespace fastdiff::CPU_CAPABILITY
