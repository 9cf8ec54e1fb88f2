// fastdiff::weights_state on CPU tensors: a number by which a caller sees that weights have
// changed.
//
// The number changes when a tensor is replaced by another, when PyTorch counts a write to a tensor,
// or when a sample of a tensor's values changes. The sample is needed because PyTorch does not
// count writes through `.data`, by which averaged weights are swapped in. It is a diagonal of the
// tensor, so that it has values of every output channel and of every input channel.
//
// fastdiff::drop_weights frees the memory of weights that are no longer needed. The tensors keep
// their sizes, and whatever asks for their memory gets an error. They have no values to sample.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "cpu/tensors.h"

namespace fastdiff {
namespace {

constexpr uint64_t kPrime = 0x9E3779B97F4A7C15;

uint64_t mixed(uint64_t state, uint64_t value) {
  state = (state ^ value) * kPrime;
  return state ^ state >> 29;
}

template <class Bits>
uint64_t sample(const at::Tensor& weight, uint64_t state) {
  const auto* values = static_cast<const Bits*>(weight.const_data_ptr());
  const int64_t dims = weight.dim(), k = dims > 0 ? weight.size(0) : 1,
                c = dims > 1 ? weight.size(1) : 1;
  // Offsets of a kernel's taps: every index of the dimensions after the first two.
  std::vector<int64_t> taps{0};
  for (int64_t d = 2; d < dims; ++d) {
    const auto before = std::move(taps);
    taps = {};
    for (const int64_t offset : before)
      for (int64_t i = 0; i < weight.size(d); ++i) taps.push_back(offset + i * weight.stride(d));
  }
  const int64_t row = dims > 0 ? weight.stride(0) : 0, column = dims > 1 ? weight.stride(1) : 0,
                count = static_cast<int64_t>(taps.size());
  for (int64_t i = 0, a = 0, b = 0, t = 0; i < std::max(k, c); ++i) {
    state = mixed(state, values[a * row + b * column + taps[t]]);
    if (++a == k) a = 0;
    if (++b == c) b = 0;
    if (++t == count) t = 0;
  }
  return state;
}

bool is_dropped(c10::StorageImpl* storage) {
  return storage->nbytes() > 0 && !storage->_mutable_data_ptr_no_checks();
}

uint64_t state_of(const at::Tensor& weight) {
  uint64_t state = reinterpret_cast<uintptr_t>(weight.unsafeGetTensorImpl());
  if (!weight.is_inference())
    state = mixed(state, weight.unsafeGetTensorImpl()->version_counter().current_version());
  auto* storage = weight.storage().unsafeGetStorageImpl();
  if (is_dropped(storage)) return mixed(state, reinterpret_cast<uintptr_t>(storage));
  state = mixed(state, reinterpret_cast<uintptr_t>(weight.const_data_ptr()));
  if (weight.numel() == 0) return state;
  switch (weight.element_size()) {
    case 2:
      return sample<uint16_t>(weight, state);
    case 4:
      return sample<uint32_t>(weight, state);
    default:
      return sample<uint64_t>(weight, state);
  }
}

int64_t weights_state_cpu(at::TensorList weights) {
  std::vector<uint64_t> states(weights.size());
  for (const auto& weight : weights) {
    check_floating(weight, "weights");
    TORCH_CHECK_VALUE(weight.layout() == at::kStrided, "weights must be dense");
  }
  at::parallel_for(0, static_cast<int64_t>(weights.size()), 8, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) states[i] = state_of(weights[i]);
  });
  uint64_t all = weights.size();
  for (const uint64_t state : states) all = mixed(all, state);
  return static_cast<int64_t>(all);
}

void drop_weights_cpu(at::TensorList weights, std::string message) {
  for (const auto& weight : weights) {
    check_device(weight, at::kCPU, "weights");
    auto* storage = weight.storage().unsafeGetStorageImpl();
    TORCH_CHECK_VALUE(weight.layout() == at::kStrided && weight.is_non_overlapping_and_dense() &&
                          static_cast<size_t>(weight.nbytes()) == storage->nbytes(),
                      "a weight can be dropped only where it fills its storage, got ",
                      weight.sizes(), " in ", storage->nbytes(), " bytes");
    const auto freed = std::exchange(storage->_mutable_data_ptr_no_checks(),
                                     at::DataPtr(nullptr, at::Device(at::kCPU)));
    storage->release_data_and_set_meta_custom_data_ptr_error_msg_(message);
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(fastdiff, CPU, m) {
  m.impl("weights_state", weights_state_cpu);
  m.impl("drop_weights", drop_weights_cpu);
}

}  // namespace fastdiff
