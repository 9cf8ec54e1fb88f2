// x_t = signal[t] x_0 + sigma[t] noise. The noise is given, or computed here from a seed.
//
// q_sample reads 2 S and writes 1 S for images of S bytes, the least possible. The tensors share a
// layout, whichever it is, and are walked flat.
//
// q_sample_from_seed reads 1 S and writes 1 S, the least possible. Its noise is computed from a
// counter (kernels/philox.h) piece by piece, into a buffer on the stack, in the wide type, and goes
// nowhere else.
#include "cpu/kernels/q_sample.h"

#include "cpu/kernels/lanes.h"
#include "cpu/kernels/noise.h"

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

template <class T>
static void run_from_seed(const QSampleFromSeedArgs& a, int64_t begin, int64_t end) {
  using B = Block<T>;
  using Wide = typename Lanes<T>::Wide;
  const int64_t image = a.pieces.channels * a.pieces.pixels;
  const auto* signal = static_cast<const Wide*>(a.signal);
  const auto* sigma = static_cast<const Wide*>(a.sigma);
  NoiseBuffer<Wide> buffer;
  for (int64_t index = begin; index < end; ++index) {
    const Piece piece(a.pieces, index);
    const PhiloxStream stream(a.seed + 2 * piece.n, a.row);
    const Wide* z = noise_of(a.pieces, piece, stream, buffer);
    const T* x0 = static_cast<const T*>(a.x0) + piece.n * image;
    T* out = static_cast<T*>(a.out) + piece.n * image;
    const auto s = B::fill(signal[a.t[piece.n]]), e = B::fill(sigma[a.t[piece.n]]);
    piece.for_runs(a.pieces, [&](int64_t offset, int64_t length, int64_t from) FASTDIFF_HOT {
      for_blocks<T>(length, [&](int64_t i, int64_t count) FASTDIFF_HOT {
        B x = B::load(x0 + offset + i, count);
        const B noise = B::load_wide(z + from + i);
        for (int r = 0; r < Lanes<T>::parts; ++r)
          x.part[r] = at::vec::fmadd(s.part[r], x.part[r], e.part[r] * noise.part[r]);
        x.store(out + offset + i, count);
      });
    });
  }
}

void q_sample_from_seed(const QSampleFromSeedArgs& a, int64_t begin, int64_t end) {
  for_dtype(a.dtype,
            [&](auto* tag) { run_from_seed<std::remove_pointer_t<decltype(tag)>>(a, begin, end); });
}

}  // namespace fastdiff::CPU_CAPABILITY
