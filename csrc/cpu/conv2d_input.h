// What a convolution reads, as tensors: checked, and laid out as the kernels want it.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "cpu/kernels/conv2d.h"

namespace fastdiff {

using OptionalTensor = std::optional<at::Tensor>;

// PyTorch's threads.
Threads conv2d_threads();

// The input of a convolution, and the part of its description that follows from it.
struct ConvInput {
  Conv2d p;

  // ValueError or TypeError for tensors that do not fit each other or the spec. The algorithm has
  // been asked whether it takes x's dtype.
  ConvInput(const ConvSpec& spec, const at::Tensor& x, const OptionalTensor& skip,
            const OptionalTensor& norm);

  // Lets `p` point to the tensors or to copies of them, which live as long as this.
  void hold();

 private:
  at::Tensor x_;
  OptionalTensor skip_, norm_;
};

}  // namespace fastdiff
