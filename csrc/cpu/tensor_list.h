// Work on the elements of a list of tensors, all of them together: many small tensors cost no more
// than a large one.
#pragma once

#include <algorithm>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/tensors.h"

namespace fastdiff {

// Whether `a` and `b`, of one shape, can be walked flat together: neither has gaps, and elements of
// one index lie in the same order.
inline bool walk_together(const at::Tensor& a, const at::Tensor& b) {
  if (!a.is_non_overlapping_and_dense() || !b.is_non_overlapping_and_dense()) return false;
  for (int64_t d = 0; d < a.dim(); ++d)
    if (a.size(d) > 1 && a.stride(d) != b.stride(d)) return false;
  return true;
}

// The tensors laid one behind the other and cut into units. Units depend on the sizes alone.
class TensorList {
 public:
  // Elements of a unit: tens of microseconds of work, and few enough that threads end together.
  static constexpr int64_t kUnit = 32768;

  explicit TensorList(at::TensorList tensors) {
    constexpr int64_t kAligned = 64;  // elements: a tensor is cut at cache lines of every dtype
    int64_t end = 0;
    for (const auto& tensor : tensors) {
      sizes_.push_back(tensor.numel());
      ends_.push_back(end += (tensor.numel() + kAligned - 1) / kAligned * kAligned);
    }
  }

  int64_t units() const { return ends_.empty() ? 0 : (ends_.back() + kUnit - 1) / kUnit; }

  // Calls body(unit, tensor, begin, end) for the elements begin..end-1 of each tensor in each unit.
  template <class Body>
  void for_each(const Body& body) const {
    for_each_unit(units(), [&](int64_t unit, int64_t) {
      const int64_t first = unit * kUnit, last = first + kUnit;
      auto tensor = std::upper_bound(ends_.begin(), ends_.end(), first) - ends_.begin();
      for (; tensor < static_cast<int64_t>(ends_.size()); ++tensor) {
        const int64_t start = tensor ? ends_[tensor - 1] : 0;
        if (start >= last) break;
        const int64_t begin = std::max<int64_t>(0, first - start);
        const int64_t end = std::min(sizes_[tensor], last - start);
        if (begin < end) body(unit, tensor, begin, end);
      }
    });
  }

 private:
  std::vector<int64_t> sizes_, ends_;
};

}  // namespace fastdiff
