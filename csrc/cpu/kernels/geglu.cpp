// a * gelu(b) (Shazeer 2020, arXiv:2002.05202) and its gradient, in float32. For results of S bytes
// the forward reads 2 S and writes 1 S, the backward reads 3 S and writes 2 S: the least possible.
// Two operations, gelu and a product, read 3 S and write 2 S forward.
#include "cpu/kernels/geglu.h"

#include "cpu/kernels/activations.h"
#include "cpu/kernels/dtypes.h"

namespace fastdiff::CPU_CAPABILITY {
namespace {

// Calls one(i, lanes) for the vectors of `width` columns; the last one may have fewer lanes.
template <class One>
FASTDIFF_INLINE void for_vectors(int64_t width, const One& one) {
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) one(i, kLanes);
  if (i < width) one(i, width - i);
}

template <class T>
void rows(const Geglu& p, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T* a = static_cast<const T*>(p.x) + row * 2 * p.width;
    const T* b = a + p.width;
    T* out = static_cast<T*>(p.out) + row * p.width;
    for_vectors(p.width, [&](int64_t i, int64_t lanes) FASTDIFF_HOT {
      store_lanes(out + i, load_lanes(a + i, lanes) * gelu(load_lanes(b + i, lanes)), lanes);
    });
  }
}

// [grad gelu(b), grad a gelu'(b)] with gelu(b) = b Phi(b) and gelu'(b) = Phi(b) + b Phi'(b).
template <class T>
void backward_rows(const GegluBackward& p, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T* a = static_cast<const T*>(p.x) + row * 2 * p.width;
    const T* b = a + p.width;
    const T* grad = static_cast<const T*>(p.grad) + row * p.width;
    T* da = static_cast<T*>(p.dx) + row * 2 * p.width;
    T* db = da + p.width;
    for_vectors(p.width, [&](int64_t i, int64_t lanes) FASTDIFF_HOT {
      const F g = load_lanes(grad + i, lanes), gate = load_lanes(b + i, lanes);
      const Normal of = normal(gate);
      store_lanes(da + i, g * (gate * of.distribution), lanes);
      store_lanes(db + i, g * load_lanes(a + i, lanes) * (of.distribution + gate * of.density),
                  lanes);
    });
  }
}

}  // namespace

void geglu(const Geglu& p, int64_t begin, int64_t end) {
  for_float_or_bfloat16(p.dtype, [&]<class T>() { rows<T>(p, begin, end); });
}

void geglu_backward(const GegluBackward& p, int64_t begin, int64_t end) {
  for_float_or_bfloat16(p.dtype, [&]<class T>() { backward_rows<T>(p, begin, end); });
}

}  // namespace fastdiff::CPU_CAPABILITY
