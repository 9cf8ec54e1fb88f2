// Standard normal values from a counter (kernels/philox.h), one stream an image.
//
// Writes S for noise of S bytes, which is the least there is, and reads nothing.
#include "cpu/kernels/philox_normal.h"

#include "cpu/kernels/philox.h"

namespace fastdiff::CPU_CAPABILITY {

template <class T>
static void run(const PhiloxNormalArgs& a, int64_t begin, int64_t end) {
  using B = Block<T>;
  typename Lanes<T>::Wide buffer[kPhiloxPiece + 2 * kPhiloxBlock];
  for (int64_t piece = begin; piece < end; ++piece) {
    const int64_t n = piece / a.pieces, first = piece % a.pieces * kPhiloxPiece;
    const int64_t count = a.image - first < kPhiloxPiece ? a.image - first : kPhiloxPiece;
    const auto* z = PhiloxStream(a.seed + 2 * n, a.row).fill(first, count, buffer);
    T* out = static_cast<T*>(a.out) + n * a.image + first;
    for_blocks<T>(count, [&](int64_t i, int64_t part) FASTDIFF_HOT {
      B::load_wide(z + i).store(out + i, part);  // the buffer has room for a whole block
    });
  }
}

void philox_normal(const PhiloxNormalArgs& a, int64_t begin, int64_t end) {
  for_dtype(a.dtype, [&](auto* tag) { run<std::remove_pointer_t<decltype(tag)>>(a, begin, end); });
}

}  // namespace fastdiff::CPU_CAPABILITY
