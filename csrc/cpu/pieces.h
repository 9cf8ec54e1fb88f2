#pragma once

#include "cpu/kernels/pieces.h"
#include "cpu/tensors.h"

namespace fastdiff {

inline Pieces pieces_of(const at::Tensor& x, at::MemoryFormat format) {
  const int64_t image = x.size(0) == 0 ? 0 : x.numel() / x.size(0);
  Pieces p{1, image, 1, 0, 1, 0};
  if (image == 0) return p;
  if (format != at::MemoryFormat::Contiguous && x.size(1) < image) {
    p.channels = x.size(1);
    p.pixels = image / p.channels;
    p.width = std::min(p.channels, kPiece / std::min(p.pixels, kNoiseBlock));
  }
  const int64_t fit = kPiece / p.width;
  p.length = p.pixels <= fit ? p.pixels : fit / kNoiseBlock * kNoiseBlock;
  p.across = (p.channels + p.width - 1) / p.width;
  p.count = p.across * ((p.pixels + p.length - 1) / p.length);
  return p;
}

// Pieces that are worth a thread of their own, of `grain` elements.
inline int64_t grain_of(const Pieces& p, int64_t grain) {
  return std::max<int64_t>(1, grain / std::max<int64_t>(1, p.width * p.length));
}

}  // namespace fastdiff
