// Standard normal values from a counter (kernels/philox.h), one stream an image.
//
// Writes 1 S for noise of S bytes and reads nothing, the least possible.
#include "cpu/kernels/philox_normal.h"

#include "cpu/kernels/dtypes.h"
#include "cpu/kernels/philox.h"

namespace fastdiff::CPU_CAPABILITY {
namespace {

template <class T>
void pieces(const PhiloxNormalArgs& a, int64_t begin, int64_t end) {
  typename Lanes<T>::Wide buffer[kPhiloxPiece + 2 * kPhiloxValues];
  for (int64_t piece = begin; piece < end; ++piece) {
    const int64_t n = piece / a.pieces, first = piece % a.pieces * kPhiloxPiece;
    const int64_t count = a.image - first < kPhiloxPiece ? a.image - first : kPhiloxPiece;
    const auto* z = PhiloxStream(a.seed + 2 * n, a.row).fill(first, count, buffer);
    T* out = static_cast<T*>(a.out) + n * a.image + first;
    for_values<T>(count, [&](int64_t i, int64_t left) FASTDIFF_HOT {
      Values<T>::load_wide(z + i).store(out + i, left);  // the buffer is padded
    });
  }
}

}  // namespace

void philox_normal(const PhiloxNormalArgs& a, int64_t begin, int64_t end) {
  for_floating(a.dtype, [&]<class T>() { pieces<T>(a, begin, end); });
}

}  // namespace fastdiff::CPU_CAPABILITY
