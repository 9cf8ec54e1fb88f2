#pragma once

#include "cpu/kernels/image_pieces.h"
#include "cpu/tensors.h"

namespace fastdiff {

// Chooses pieces for the images of x, which lie in memory as `format` says.
inline Pieces pieces_of(const at::Tensor& x, at::MemoryFormat format) {
  const int64_t image = x.size(0) == 0 ? 0 : x.numel() / x.size(0);
  Pieces p{1, image, 1, 0, 1, 0};
  if (image == 0) return p;
  if (format != at::MemoryFormat::Contiguous && x.size(1) < image) {
    p.channels = x.size(1);
    p.pixels = image / p.channels;
    p.width = std::min(p.channels, kPiece / std::min(p.pixels, kNoisePixels));
  }
  const int64_t fit = kPiece / p.width;
  p.length = p.pixels <= fit ? p.pixels : fit / kNoisePixels * kNoisePixels;
  p.across = (p.channels + p.width - 1) / p.width;
  p.count = p.across * ((p.pixels + p.length - 1) / p.length);
  return p;
}

// How many pieces have `grain` elements, one at least: what a thread gets.
inline int64_t grain_of(const Pieces& p, int64_t grain) {
  return std::max<int64_t>(1, grain / std::max<int64_t>(1, p.width * p.length));
}

}  // namespace fastdiff
