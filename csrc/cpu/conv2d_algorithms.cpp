#include "cpu/conv2d_algorithms.h"

#include <algorithm>

namespace fastdiff {

FASTDIFF_DECLARE_CONV2D(conv2d_direct)
FASTDIFF_DECLARE_CONV2D(conv2d_winograd2)
FASTDIFF_DECLARE_CONV2D(conv2d_winograd4)
FASTDIFF_DECLARE_CONV2D(conv2d_strassen)
FASTDIFF_DECLARE_CONV2D(conv2d_phases4)
FASTDIFF_DECLARE_CONV2D_BF16(conv2d_direct_bf16)
FASTDIFF_DECLARE_CONV2D_BF16(conv2d_phases_bf16)
FASTDIFF_DECLARE_CONV2D_BF16(conv2d_split_bf16)
FASTDIFF_DECLARE_CONV2D_BF16(conv2d_winograd2_bf16)
FASTDIFF_DECLARE_WEIGHT_GRADIENT(conv2d_direct)
FASTDIFF_DECLARE_WEIGHT_GRADIENT(conv2d_winograd2)
FASTDIFF_DECLARE_WEIGHT_GRADIENT(conv2d_winograd4)
FASTDIFF_DECLARE_WEIGHT_GRADIENT_BF16(conv2d_direct_bf16)

namespace {

constexpr const char* kUpsampledPurpose =
    "3x3 kernels, stride 1, upsampled images and even sums of padding";

bool of_3x3(const ConvWeight& weight) { return weight.kernel_h == 3 && weight.kernel_w == 3; }

bool of_halves(const ConvWeight& weight) {
  return weight.kernel_h == 1 && weight.kernel_w == 1 && weight.channels % 32 == 0;
}

// Tiles multiply so fast that transforms would take longer than the products that they save.
bool of_3x3_by_dots(const ConvWeight& weight) { return of_3x3(weight) && isa() == Isa::Avx512Bf16; }

bool steps_of_1(const ConvSpec& spec) { return spec.stride_h == 1 && spec.stride_w == 1; }

bool steps_of_1_after_silu(const ConvSpec& spec) { return steps_of_1(spec) && spec.silu; }

bool in_phases(const ConvSpec& spec) {
  return steps_of_1(spec) && spec.upsample && (spec.top + spec.bottom) % 2 == 0 &&
         (spec.left + spec.right) % 2 == 0;
}

}  // namespace

const std::vector<ConvAlgorithm>& conv2d_algorithms() {
  // 16 tiles of F(4x4): with fewer its transforms and its weight's 36 planes do not pay.
  constexpr int64_t kPixels = 16 * 16;
  const bool tiles = isa() == Isa::Amx;
  static const std::vector<ConvAlgorithm> list{
      {.name = "direct",
       .purpose = "all convolutions",
       .gated_multiple = 256,
       .strict = true,
       .cost = {.share = 0.9},
       .pack = FASTDIFF_KERNEL(conv2d_direct_pack),
       .run = FASTDIFF_KERNEL(conv2d_direct),
       .weight_gradient = FASTDIFF_KERNEL(conv2d_direct_weight_gradient),
       .weight_gradient_cost = {.share = 1, .narrow = 16, .narrow_share = 0.6}},
      {.name = "winograd2",
       .purpose = "3x3 kernels and stride 1",
       .packs = of_3x3,
       .suits = steps_of_1,
       .cost = {.share = 0.46, .narrow = 16, .narrow_share = 0.95},
       .pack = FASTDIFF_KERNEL(conv2d_winograd2_pack),
       .run = FASTDIFF_KERNEL(conv2d_winograd2),
       .weight_gradient = FASTDIFF_KERNEL(conv2d_winograd2_weight_gradient),
       .weight_gradient_cost =
           {.share = 0.52, .narrow = 16, .narrow_share = 0.9, .small = 32, .small_share = 1.2}},
      {.name = "winograd4",
       .purpose = "3x3 kernels and stride 1",
       .packs = of_3x3,
       .suits = steps_of_1,
       .cost =
           {.share = 0.3, .narrow = 16, .narrow_share = 0.99, .small = kPixels, .small_share = 0.6},
       .pack = FASTDIFF_KERNEL(conv2d_winograd4_pack),
       .run = FASTDIFF_KERNEL(conv2d_winograd4),
       .weight_gradient = FASTDIFF_KERNEL(conv2d_winograd4_weight_gradient),
       .weight_gradient_cost = {.share = 0.36,
                                .narrow = 16,
                                .narrow_share = 0.7,
                                .small = kPixels,
                                .small_share = 0.7}},
      // Packed it takes 7/4 of the direct one's memory.
      {.name = "strassen",
       .purpose = "1x1 kernels and channels in multiples of 32",
       .packs = of_halves,
       .gated_multiple = 256,
       .cost = {.share = 0.84,
                .narrow = 256,
                .narrow_share = 0.95,
                .small = 256,
                .small_share = 0.95,
                .handicap = 0.98},
       .pack = FASTDIFF_KERNEL(conv2d_strassen_pack),
       .run = FASTDIFF_KERNEL(conv2d_strassen)},
      // Packed it takes 100/36 of winograd4's memory.
      {.name = "phases4",
       .purpose = kUpsampledPurpose,
       .packs = of_3x3,
       .suits = in_phases,
       .cost = {.share = 0.21,
                .narrow = 16,
                .narrow_share = 0.95,
                .small = kPixels,
                .small_share = 0.6,
                .handicap = 0.95},
       .pack = FASTDIFF_KERNEL(conv2d_phases4_pack),
       .run = FASTDIFF_KERNEL(conv2d_phases4)},
      // Each float32 as a sum of two bfloat16: by dot products it would only equal `direct`.
      {.name = "split_bf16",
       .purpose = "all convolutions",
       .dtypes = {at::kFloat},
       .isa = Isa::Amx,
       .packed_dtype = at::kBFloat16,
       .gated_multiple = 64,
       .cost = {.share = 0.25, .narrow = 16, .narrow_share = 1},
       .pack = FASTDIFF_BF16_KERNEL(conv2d_split_bf16_pack),
       .run = FASTDIFF_BF16_KERNEL(conv2d_split_bf16)},
      // Its channels are multiplied by 32, and its filters by 16 at a time.
      {.name = "direct_bf16",
       .purpose = "all convolutions",
       .dtypes = {at::kBFloat16},
       .isa = Isa::Avx512Bf16,
       .packed_dtype = at::kBFloat16,
       .gated_multiple = 64,
       .strict = true,
       .cost = {.share = tiles ? 0.08 : 0.46, .narrow = 16, .narrow_share = tiles ? 0.5 : 1},
       .pack = FASTDIFF_BF16_KERNEL(conv2d_direct_bf16_pack),
       .run = FASTDIFF_BF16_KERNEL(conv2d_direct_bf16),
       .weight_gradient = FASTDIFF_BF16_KERNEL(conv2d_direct_bf16_weight_gradient),
       .weight_gradient_cost = {.share = tiles ? 0.12 : 0.54,
                                .narrow = 16,
                                .narrow_share = tiles ? 0.3 : 0.45}},
      // Of other convolutions its rounding would show (kernels/bf16/conv2d_winograd.cpp).
      {.name = "winograd2_bf16",
       .purpose = "3x3 kernels and stride 1 after SiLU, by dot products",
       .packs = of_3x3_by_dots,
       .suits = steps_of_1_after_silu,
       .dtypes = {at::kBFloat16},
       .isa = Isa::Avx512Bf16,
       .packed_dtype = at::kBFloat16,
       .cost = {.share = 0.24, .narrow = 16, .narrow_share = 0.8},
       .pack = FASTDIFF_BF16_KERNEL(conv2d_winograd2_bf16_pack),
       .run = FASTDIFF_BF16_KERNEL(conv2d_winograd2_bf16)},
      // 16/9 of direct_bf16's packed weight.
      {.name = "phases_bf16",
       .purpose = kUpsampledPurpose,
       .packs = of_3x3,
       .suits = in_phases,
       .dtypes = {at::kBFloat16},
       .isa = Isa::Avx512Bf16,
       .packed_dtype = at::kBFloat16,
       .cost = {.share = tiles ? 0.045 : 0.23,
                .narrow = 16,
                .narrow_share = tiles ? 0.3 : 0.5,
                .handicap = 0.98},
       .pack = FASTDIFF_BF16_KERNEL(conv2d_phases_bf16_pack),
       .run = FASTDIFF_BF16_KERNEL(conv2d_phases_bf16)},
  };
  return list;
}

const ConvAlgorithm& conv2d_algorithm(int64_t number) {
  const auto& list = conv2d_algorithms();
  TORCH_CHECK_VALUE(number >= 0 && number < static_cast<int64_t>(list.size()), "unknown algorithm ",
                    number, ", wanted 0 to ", list.size() - 1);
  return list[number];
}

std::optional<std::string> ConvAlgorithm::refusal(const ConvSpec& spec) const {
  if (fastdiff::isa() < isa) return std::string(name) + " needs " + isa_name(isa);
  if (!packs(spec) || !suits(spec)) return std::string(name) + " is for " + purpose;
  if (spec.gated && gated_multiple == 0) return std::string(name) + " computes nothing gated";
  if (spec.gated && spec.filters % gated_multiple != 0)
    return std::string(name) + " gates filters in multiples of " + std::to_string(gated_multiple);
  return std::nullopt;
}

std::optional<std::string> ConvAlgorithm::weight_gradient_refusal(const ConvSpec& spec) const {
  if (!weight_gradient) return std::string(name) + " computes no gradient of a weight";
  if (spec.gated) return "the gradient of a weight is that of a convolution without gates";
  return refusal(spec);
}

int64_t ConvAlgorithm::packed_count(const ConvWeight& weight) const {
  TORCH_CHECK_VALUE(
      packs(weight), name, " is for ", purpose, ", got a weight of ",
      at::IntArrayRef({weight.filters, weight.channels, weight.kernel_h, weight.kernel_w}));
  TORCH_CHECK_VALUE(fastdiff::isa() >= isa, name, " needs ", isa_name(isa));
  int64_t count = 0;
  pack(weight, {}, nullptr, &count, {1, nullptr});
  return count;
}

bool ConvAlgorithm::takes(at::ScalarType dtype) const {
  return std::find(dtypes.begin(), dtypes.end(), dtype) != dtypes.end();
}

}  // namespace fastdiff
