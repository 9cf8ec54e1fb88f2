// The ways to compute a convolution. The list in conv2d_algorithms.cpp is the only place that knows
// them: conv2d.cpp runs them by their number in it, and Python asks it through fastdiff._C.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <vector>

#include "cpu/isa.h"
#include "cpu/kernels/conv2d.h"

namespace fastdiff {

// What an algorithm takes, for choices that are made without a clock: shares of the time that
// PyTorch takes for the same.
struct ConvCost {
  double share;
  // With fewer filters or input channels than `narrow`.
  int64_t narrow = 0;
  double narrow_share = 0;
  // Else with fewer output pixels, of all images together, than `small`.
  int64_t small = 0;
  double small_share = 0;
  // Whoever chooses, by the clock or by these shares, divides the time by it: below 1 where packed
  // weights take so much memory that a few percent are not worth it.
  double handicap = 1;
};

struct ConvAlgorithm {
  const char* name;
  const char* purpose;  // completes the sentence "NAME is for PURPOSE"
  // Whether it is for such a weight, and, where it is, for such a convolution by it.
  bool (*packs)(const ConvWeight&) = [](const ConvWeight&) { return true; };
  bool (*suits)(const ConvSpec&) = [](const ConvSpec&) { return true; };
  std::vector<at::ScalarType> dtypes = {at::kFloat, at::kBFloat16};  // of x
  Isa isa = Isa::Default;  // the least instruction set that it runs on
  at::ScalarType packed_dtype = at::kFloat;
  int64_t gated_multiple = 0;  // a gated convolution's filters come in multiples of it; 0: no gates
  bool strict = false;         // whether it rounds no more than float32 sums of all products do
  ConvCost cost;
  void (*pack)(const ConvWeight&, const WeightValues&, void* packed, int64_t* count,
               const Threads&);
  void (*run)(const Conv2d&);
  // The gradient of the weight, and what it takes; null if the algorithm has none.
  void (*weight_gradient)(const ConvWeightGradient&) = nullptr;
  ConvCost weight_gradient_cost{};

  // Why it cannot compute such a convolution on this machine, as a sentence, or nothing if it can.
  std::optional<std::string> refusal(const ConvSpec& spec) const;
  // The same of the gradient of such a convolution's weight.
  std::optional<std::string> weight_gradient_refusal(const ConvSpec& spec) const;
  // How many elements of packed_dtype the packed weight has; ValueError if it is for no such one.
  int64_t packed_count(const ConvWeight& weight) const;
  bool takes(at::ScalarType dtype) const;
};

// All of them, those that are usually the quickest last.
const std::vector<ConvAlgorithm>& conv2d_algorithms();

// That of a number in the list, or ValueError.
const ConvAlgorithm& conv2d_algorithm(int64_t number);

}  // namespace fastdiff
