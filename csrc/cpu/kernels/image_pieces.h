#pragma once

#include <cstdint>

namespace fastdiff {

// The pieces of an image: the portions that a kernel works on where it may compute noise, which
// takes a buffer for each. Noise follows the logical order of the elements, channels-first. So a
// dense channels-first image counts as one channel, and a channels-last image is cut into
// rectangles of `length` pixels by `width` channels, smaller ones at its edges.
struct Pieces {
  int64_t channels, pixels;  // of an image
  int64_t width, length;
  int64_t across, count;  // pieces side by side along the channels, and of the whole image
};

constexpr int64_t kPiece = 1024;      // elements of a piece at most
constexpr int64_t kNoisePixels = 64;  // a piece has a multiple of so many pixels, or all of them

}  // namespace fastdiff
