// a * gelu(b) (Shazeer 2020, arXiv:2002.05202) in float32. Reads 2 S and writes 1 S for results of
// S bytes, the least possible. Two operations, gelu and a product, read 3 S and write 2 S.
#include "cpu/kernels/geglu.h"

#include "cpu/kernels/activations.h"
#include "cpu/kernels/dtypes.h"

namespace fastdiff::CPU_CAPABILITY {
namespace {

template <class T>
void rows(const Geglu& p, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T* a = static_cast<const T*>(p.x) + row * 2 * p.width;
    const T* b = a + p.width;
    T* out = static_cast<T*>(p.out) + row * p.width;
    const auto one = [&](int64_t i, int64_t lanes) FASTDIFF_HOT {
      store_lanes(out + i, load_lanes(a + i, lanes) * gelu(load_lanes(b + i, lanes)), lanes);
    };
    int64_t i = 0;
    for (; i + kLanes <= p.width; i += kLanes) one(i, kLanes);
    if (i < p.width) one(i, p.width - i);
  }
}

}  // namespace

void geglu(const Geglu& p, int64_t begin, int64_t end) {
  for_float_or_bfloat16(p.dtype, [&]<class T>() { rows<T>(p, begin, end); });
}

}  // namespace fastdiff::CPU_CAPABILITY
