// What every CUDA operation's header needs: plain C++, without PyTorch's and CUDA's headers.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastdiff::cuda {

using Stream = void*;  // a cudaStream_t

// The type of an operation's activations. float64 is left to the reference.
enum class Dtype { Float32, BFloat16, Float16 };

constexpr int64_t size_of(Dtype dtype) { return dtype == Dtype::Float32 ? 4 : 2; }

}  // namespace fastdiff::cuda
