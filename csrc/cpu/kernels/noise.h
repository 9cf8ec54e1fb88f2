// The noise of a piece of an image from a seed, in the order in which the piece lies in memory.
#pragma once

#include "cpu/kernels/image_pieces.h"
#include "cpu/kernels/philox.h"

namespace fastdiff::CPU_CAPABILITY {

static_assert(kNoisePixels % kPhiloxValues == 0);

// Channels channel..channel+width-1 of pixels pixel..pixel+length-1 of image n.
struct Piece {
  int64_t n, channel, width, pixel, length;

  Piece(const Pieces& p, int64_t index) : n(index / p.count) {
    const int64_t place = index % p.count;
    channel = place % p.across * p.width;
    pixel = place / p.across * p.length;
    width = p.channels - channel < p.width ? p.channels - channel : p.width;
    length = p.pixels - pixel < p.length ? p.pixels - pixel : p.length;
  }

  // Calls body(offset, count, i) for each run: `count` elements of the image from element `offset`
  // on, which are those of the piece from its element i on.
  template <class Body>
  FASTDIFF_INLINE void for_runs(const Pieces& p, Body&& body) const {
    if (width == p.channels) return body(pixel * p.channels, length * width, int64_t{0});
    for (int64_t i = 0; i < length; ++i) body((pixel + i) * p.channels + channel, width, i * width);
  }
};

// Room for the noise of a piece, padded since whole Values are written and read.
template <class Wide>
struct NoiseBuffer {
  Wide line[kPiece + 2 * kPhiloxValues];  // channel after channel, as the generator counts
  Wide mixed[kPiece + kPhiloxValues];     // pixel after pixel, where channels are interleaved
};

template <class Wide>
FASTDIFF_INLINE void spread(const Wide* line, int64_t length, int64_t width, Wide* out) {
  for (int64_t i = 0; i < length; ++i) out[i * width] = line[i];
}

// Computes the noise of a piece into `to`, and returns where it begins there. The generator counts
// channels-first, so the pixels of each channel are computed together, then interleaved.
template <class Wide>
static __attribute__((noinline)) const Wide* noise_of(const Pieces& p, const Piece& at,
                                                      const PhiloxStream& stream,
                                                      NoiseBuffer<Wide>& to) {
  const int64_t first = at.channel * p.pixels + at.pixel;
  if (at.width == 1) return stream.fill(first, at.length, to.line);
  const bool together = at.length == p.pixels;  // the piece's channels are then one run
  const Wide* line = together ? stream.fill(first, at.width * at.length, to.line) : nullptr;
  for (int64_t c = 0; c < at.width; ++c) {
    const Wide* z =
        together ? line + c * at.length : stream.fill(first + c * p.pixels, at.length, to.line);
    if (at.width == 3) {
      spread<Wide>(z, at.length, 3, to.mixed + c);
    } else if (at.width == 4) {
      spread<Wide>(z, at.length, 4, to.mixed + c);
    } else {
      spread<Wide>(z, at.length, at.width, to.mixed + c);
    }
  }
  return to.mixed;
}

}  // namespace fastdiff::CPU_CAPABILITY
