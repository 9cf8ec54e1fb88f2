#pragma once

#include "cpu/kernels/vectors.h"

namespace fastdiff::CPU_CAPABILITY {

// a + weight (b - a), as torch.lerp computes it: a itself at weight 0 and b itself at weight 1.
template <class T>
class Lerp {
 public:
  using Wide = typename Lanes<T>::Wide;

  explicit Lerp(double weight)
      : from_a_(static_cast<Wide>(weight) < Wide(0.5)),
        factor_(from_a_ ? static_cast<Wide>(weight) : static_cast<Wide>(weight) - Wide(1)) {}

  FASTDIFF_INLINE Values<T> operator()(const Values<T>& a, const Values<T>& b) const {
    return fmadd(factor_, b - a, from_a_ ? a : b);
  }

 private:
  bool from_a_;
  Values<T> factor_;
};

}  // namespace fastdiff::CPU_CAPABILITY
