// x_t = signal[t] x_0 + sigma[t] noise, layout by layout the same: the tensors are walked flat.
// Reads 2 S and writes 1 S for an activation of S bytes, which is the least there is.
#include "cpu/kernels/q_sample.h"

#include "cpu/kernels/lanes.h"

namespace fastdiff::CPU_CAPABILITY {

template <class T>
static void run(const QSampleArgs& a, int64_t begin, int64_t end) {
  using B = Block<T>;
  using Wide = typename Lanes<T>::Wide;
  const auto* signal = static_cast<const Wide*>(a.signal);
  const auto* sigma = static_cast<const Wide*>(a.sigma);
  while (begin < end) {
    const int64_t n = begin / a.image;
    const int64_t stop = end < (n + 1) * a.image ? end : (n + 1) * a.image;
    const T* x0 = static_cast<const T*>(a.x0) + begin;
    const T* noise = static_cast<const T*>(a.noise) + begin;
    T* out = static_cast<T*>(a.out) + begin;
    const auto s = B::fill(signal[a.t[n]]), e = B::fill(sigma[a.t[n]]);
    for_blocks<T>(stop - begin, [&](int64_t i, int64_t count) FASTDIFF_HOT {
      B x = B::load(x0 + i, count);
      const B z = B::load(noise + i, count);
      for (int r = 0; r < Lanes<T>::parts; ++r)
        x.part[r] = at::vec::fmadd(s.part[r], x.part[r], e.part[r] * z.part[r]);
      x.store(out + i, count);
    });
    begin = stop;
  }
}

void q_sample(const QSampleArgs& a, int64_t begin, int64_t end) {
  for_dtype(a.dtype, [&](auto* tag) { run<std::remove_pointer_t<decltype(tag)>>(a, begin, end); });
}

}  // namespace fastdiff::CPU_CAPABILITY
