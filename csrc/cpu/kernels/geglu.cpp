// a * b * (1 + erf(b / sqrt 2)) / 2 (Hendrycks & Gimpel, arXiv:1606.08415; Shazeer,
// arXiv:2002.05202), in float32. Reads 2 S and writes 1 S for results of S bytes, which is the
// least; gelu(b) and its product apart read 3 S and write 2 S.
#include "cpu/kernels/geglu.h"

#include "cpu/kernels/lanes.h"

namespace fastdiff::CPU_CAPABILITY {
namespace {

template <class T>
void rows(const Geglu& p, int64_t begin, int64_t end) {
  using B = Block<T>;
  using V = typename Lanes<T>::V;
  const V half(0.5f), one(1.f), root(0.70710678118654752f);
  for (int64_t row = begin; row < end; ++row) {
    const T* a = static_cast<const T*>(p.x) + row * 2 * p.width;
    const T* b = a + p.width;
    T* out = static_cast<T*>(p.out) + row * p.width;
    for_blocks<T>(p.width, [&](int64_t i, int64_t count) FASTDIFF_HOT {
      B value = B::load(a + i, count);
      const B gate = B::load(b + i, count);
      for (int r = 0; r < Lanes<T>::parts; ++r) {
        const V gelu = gate.part[r] * half * (one + (gate.part[r] * root).erf());
        value.part[r] = value.part[r] * gelu;
      }
      value.store(out + i, count);
    });
  }
}

}  // namespace

void geglu(const Geglu& p, int64_t begin, int64_t end) {
  if (p.dtype == c10::ScalarType::BFloat16) return rows<c10::BFloat16>(p, begin, end);
  rows<float>(p, begin, end);
}

}  // namespace fastdiff::CPU_CAPABILITY
