#pragma once

#include <cstdint>

namespace fastdiff {

// How a kernel that may compute noise divides the images of a batch: into pieces of `length` pixels
// and `width` channels, fewer at an image's edges. Noise goes by the logical order of the elements,
// so an image that lies in it is one channel.
struct Pieces {
  int64_t channels, pixels;  // of an image
  int64_t width, length;
  int64_t across, count;  // pieces side by side, and in an image altogether
};

constexpr int64_t kPiece = 1024;     // elements of a piece at most
constexpr int64_t kNoiseBlock = 64;  // a piece has a multiple of so many pixels, or all of them

}  // namespace fastdiff
