#include "cpu/conv2d_spec.h"

namespace fastdiff {
namespace {

constexpr size_t kNumbers = 14;
constexpr int64_t kMostSide = 64;             // of kernels, strides and paddings
constexpr int64_t kMostChannels = 1LL << 20;  // and filters

}  // namespace

ConvWeight decode_weight(at::IntArrayRef sizes) {
  TORCH_CHECK_VALUE(sizes.size() == 4, "a weight must have sizes K, C, R, S, got ", sizes);
  for (size_t d = 0; d < 4; ++d)
    TORCH_CHECK_VALUE(sizes[d] >= 1 && sizes[d] <= (d < 2 ? kMostChannels : kMostSide),
                      "a weight must have 1 to ", kMostChannels, " channels and sides of 1 to ",
                      kMostSide, ", got ", sizes);
  return {sizes[0], sizes[1], sizes[2], sizes[3]};
}

ConvSpec decode_spec(at::IntArrayRef numbers) {
  TORCH_CHECK_VALUE(numbers.size() == kNumbers, "a convolution is told in ", kNumbers,
                    " numbers, got ", numbers);
  const auto stride = numbers.slice(4, 2), padding = numbers.slice(6, 4), flags = numbers.slice(10);
  for (const auto step : stride)
    TORCH_CHECK_VALUE(step >= 1 && step <= kMostSide, "stride must be 1 to ", kMostSide, ", got ",
                      stride);
  for (const auto side : padding)
    TORCH_CHECK_VALUE(side >= 0 && side <= kMostSide, "padding must be 0 to ", kMostSide, ", got ",
                      padding);
  for (const auto flag : flags)
    TORCH_CHECK_VALUE(flag == 0 || flag == 1,
                      "upsample, silu, gated and statistics must be 0 or 1, got ", flags);
  return {decode_weight(numbers.slice(0, 4)),
          stride[0],
          stride[1],
          padding[0],
          padding[1],
          padding[2],
          padding[3],
          flags[0] == 1,
          flags[1] == 1,
          flags[2] == 1,
          flags[3] == 1};
}

}  // namespace fastdiff
