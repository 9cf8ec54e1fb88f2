#pragma once

#include <cstdint>

#include "cuda/launch.h"

namespace fastdiff::cuda {

struct PhiloxNormalArgs {
  Dtype dtype;
  int64_t images;
  int64_t image;        // elements in an image, which is contiguous
  const int64_t* seed;  // [images, 2], contiguous: the seed and the number of each image
  uint32_t row;
  void* out;  // [images, image]
};

void philox_normal_cuda(const PhiloxNormalArgs& args, Stream stream);

}  // namespace fastdiff::cuda
