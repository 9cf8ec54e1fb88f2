// x + emb, broadcast over the pixels: channels-first adds one number to each row of pixels,
// channels-last adds the image's embedding to each pixel. Reads 1 S and writes 1 S.
#include "cpu/kernels/add_time_embedding.h"

#include "cpu/kernels/lanes.h"

namespace fastdiff::CPU_CAPABILITY {

template <class T>
static void run(const AddTimeEmbeddingArgs& a, int64_t begin, int64_t end) {
  using B = Block<T>;
  const int64_t length = a.channels_last ? a.channels : a.pixels;
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(a.x) + row * length;
    T* out = static_cast<T*>(a.out) + row * length;
    if (a.channels_last) {
      const T* emb = static_cast<const T*>(a.emb) + row / a.pixels * a.channels;
      for_blocks<T>(length, [&](int64_t i, int64_t count) FASTDIFF_HOT {
        B v = B::load(x + i, count);
        const B e = B::load(emb + i, count);
        for (int r = 0; r < Lanes<T>::parts; ++r) v.part[r] = v.part[r] + e.part[r];
        v.store(out + i, count);
      });
    } else {
      const auto e = B::fill(static_cast<const T*>(a.emb)[row]);
      for_blocks<T>(length, [&](int64_t i, int64_t count) FASTDIFF_HOT {
        B v = B::load(x + i, count);
        for (int r = 0; r < Lanes<T>::parts; ++r) v.part[r] = v.part[r] + e.part[r];
        v.store(out + i, count);
      });
    }
  }
}

void add_time_embedding(const AddTimeEmbeddingArgs& a, int64_t begin, int64_t end) {
  for_dtype(a.dtype, [&](auto* tag) { run<std::remove_pointer_t<decltype(tag)>>(a, begin, end); });
}

}  // namespace fastdiff::CPU_CAPABILITY
