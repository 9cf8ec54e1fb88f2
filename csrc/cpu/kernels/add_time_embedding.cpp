// out = x + emb, where emb is broadcast over the pixels. Channels-first, one number is added to all
// pixels of a channel; channels-last, the image's embedding is added to each pixel. Reads 1 S and
// writes 1 S for images of S bytes, the least possible.
#include "cpu/kernels/add_time_embedding.h"

#include "cpu/kernels/dtypes.h"

namespace fastdiff::CPU_CAPABILITY {
namespace {

template <class T>
void rows(const AddTimeEmbeddingArgs& a, int64_t begin, int64_t end) {
  using X = Values<T>;
  const int64_t length = a.channels_last ? a.channels : a.pixels;
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(a.x) + row * length;
    T* out = static_cast<T*>(a.out) + row * length;
    if (a.channels_last) {
      const T* emb = static_cast<const T*>(a.emb) + row / a.pixels * a.channels;
      for_values<T>(length, [&](int64_t i, int64_t count) FASTDIFF_HOT {
        (X::load(x + i, count) + X::load(emb + i, count)).store(out + i, count);
      });
    } else {
      const X emb(static_cast<const T*>(a.emb)[row]);
      for_values<T>(length, [&](int64_t i, int64_t count) FASTDIFF_HOT {
        (X::load(x + i, count) + emb).store(out + i, count);
      });
    }
  }
}

}  // namespace

void add_time_embedding(const AddTimeEmbeddingArgs& a, int64_t begin, int64_t end) {
  for_floating(a.dtype, [&]<class T>() { rows<T>(a, begin, end); });
}

}  // namespace fastdiff::CPU_CAPABILITY
