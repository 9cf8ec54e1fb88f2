// How the work of group_norm_silu and its backward is divided. A plan depends on shapes, dtype,
// layout and alignment, never on the device, so that results do not either. The constants suit 132
// to 148 multiprocessors.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>

#include "cuda/group_norm_tile.cuh"

namespace fastdiff::cuda {

constexpr int kEnoughBlocks = 128;              // about one per multiprocessor
constexpr int kTileChannels = 512;              // the most in a tile that is kept on the chip
constexpr int64_t kLargest = int64_t{1} << 30;  // the most that is counted in 32 bits
constexpr int64_t kFewestBytes = 32;   // least of a pixel in a tile on the chip: a memory sector
constexpr int64_t kEnoughBytes = 128;  // a cache line

// What a thread holds in registers: the template arguments of the kernels.
struct Holding {
  int pieces, slots;
};

struct Plan {
  bool on_chip;
  Holding holding;  // on the chip
  int threads;
  Tiling tiling;
};

inline int ceil_div(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }

inline int power_of_two_from(int n) {
  int power = 1;
  while (power < n) power *= 2;
  return power;
}

// Elements of an access: as many as 16 bytes hold, if all pointers and runs are so aligned.
template <class Args>
int access_width(const Args& a, std::initializer_list<const void*> pointers) {
  const int width = static_cast<int>(16 / size_of(a.dtype));
  bool whole = a.channels_last ? a.channels % width == 0 && a.skip_channels % width == 0
                               : a.pixels % width == 0;
  for (const void* p : pointers) whole = whole && reinterpret_cast<uintptr_t>(p) % 16 == 0;
  return whole ? width : 1;
}

template <class Args>
bool has_elements(const Args& a) {
  return a.images > 0 && a.channels + a.skip_channels > 0 && a.pixels > 0;
}

template <class Args>
Tiling whole_image(const Args& a) {
  const int64_t channels = a.channels + a.skip_channels, limit = kLargest;
  if (a.pixels > limit || channels > limit || a.images > limit)
    throw std::runtime_error("group_norm_silu: " + std::to_string(a.images) + " images of " +
                             std::to_string(channels) + " channels and " +
                             std::to_string(a.pixels) + " pixels are too large");
  Tiling t{};
  t.channels = static_cast<int>(channels);
  t.per_group = static_cast<int>(channels / a.groups);
  t.pixels = static_cast<int>(a.pixels);
  t.spans = t.tiles = 1;
  return t;
}

// Channels-first on the chip: one group per block. Chooses the first holding with which a block of
// at most kTileThreads holds a group; fewer packs per thread give more threads for the group.
inline bool hold_group(const Tiling& image, int64_t groups, int width,
                       std::initializer_list<Holding> holdings, Plan& plan) {
  if (image.per_group > kTileChannels) return false;
  const int packs = ceil_div(image.pixels, width);
  for (const Holding& h : holdings) {
    Tiling t = image;
    t.slots = h.slots;
    t.lanes = std::min(32, power_of_two_from(ceil_div(packs, h.slots)));
    t.rows = ceil_div(packs, int64_t{t.lanes} * h.slots);
    t.groups = 1;
    t.tiles = static_cast<int>(groups);
    const int64_t teams = (int64_t{t.per_group} * t.rows + h.pieces - 1) / h.pieces;
    if (teams * t.lanes > kTileThreads) continue;
    plan = {true, h, ceil_div(teams * t.lanes, 32) * 32, t};
    return true;
  }
  return false;
}

// Channels-last on the chip: a block has the fewest whole groups whose channels are whole packs
// and, for each pixel, whole memory sectors. It has more groups, up to a cache line, if enough
// blocks remain.
inline bool hold_groups(const Tiling& image, int64_t images, int64_t groups, int width,
                        int64_t element, std::initializer_list<Holding> holdings, Plan& plan) {
  bool found = false;
  for (int64_t k = 1; k <= groups; ++k) {
    const int64_t channels = k * image.per_group;
    if (channels > kTileChannels) break;
    if (groups % k != 0 || channels % width != 0) continue;
    if (channels * element < kFewestBytes && k < groups) continue;
    if (found && (channels * element > kEnoughBytes || images * groups / k < kEnoughBlocks)) break;
    for (const Holding& h : holdings) {
      Tiling t = image;
      t.slots = h.slots;
      t.lanes = static_cast<int>(channels / width);
      t.rows = ceil_div(t.pixels, h.slots);
      t.groups = static_cast<int>(k);
      t.tiles = static_cast<int>(groups / k);
      if (int64_t{t.rows} * t.lanes > kTileThreads) continue;
      plan = {true, h, ceil_div(int64_t{t.rows} * t.lanes, 32) * 32, t};
      found = true;
      break;
    }
    if (!found) break;  // wider tiles do not fit either
  }
  return found;
}

inline dim3 grid_of(int64_t blocks) {
  if (blocks > 0x7fffffff)
    throw std::runtime_error("group_norm_silu: " + std::to_string(blocks) + " blocks are too many");
  return dim3(static_cast<unsigned>(blocks));
}

// The number of blocks of kSplitThreads threads.
inline int64_t split_blocks(const Tiling& t, bool last, int64_t images) {
  if (last) return images * t.tiles * t.spans;
  return images * t.tiles;
}

// Split: a thread takes `slots` packs of a piece or row. Channels-first a piece is a span, and a
// block takes as many pieces as it has teams. Channels-last a block takes up to a cache line of
// channels of `rows * slots` pixels, a span. With more slots fewer statistics are written.
inline Tiling split(const Tiling& image, bool last, int width, int slots) {
  Tiling t = image;
  t.slots = slots;
  if (last) {
    const int packs = ceil_div(t.channels, width), most = width == 1 ? 32 : 8;
    t.tiles = ceil_div(packs, most);
    t.lanes = ceil_div(packs, t.tiles);
    t.rows = std::min(kSplitThreads / t.lanes, t.pixels);
    t.spans = ceil_div(t.pixels, int64_t{t.rows} * slots);
  } else {
    const int packs = ceil_div(t.pixels, width);
    t.lanes = std::min(32, power_of_two_from(ceil_div(packs, slots)));
    t.rows = t.spans = ceil_div(packs, int64_t{t.lanes} * slots);
    if (int64_t{t.channels} * t.rows > kLargest)
      throw std::runtime_error("group_norm_silu: an image of " + std::to_string(t.channels) +
                               " channels and " + std::to_string(t.pixels) +
                               " pixels is too large");
    t.tiles = ceil_div(int64_t{t.channels} * t.rows, kSplitThreads / t.lanes);
  }
  return t;
}

}  // namespace fastdiff::cuda
