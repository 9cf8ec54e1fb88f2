// x_t = signal[t] x_0 + sigma[t] noise. The noise is given, or computed here from a seed.
//
// q_sample reads 2 S and writes 1 S for images of S bytes, the least possible. The tensors share a
// layout, whichever it is, and are walked flat.
//
// q_sample_from_seed reads 1 S and writes 1 S, the least possible. Its noise is computed from a
// counter (kernels/philox.h) piece by piece, into a buffer on the stack, in the wide type, and goes
// nowhere else.
#include "cpu/kernels/q_sample.h"

#include "cpu/kernels/dtypes.h"
#include "cpu/kernels/noise.h"

namespace fastdiff::CPU_CAPABILITY {
namespace {

template <class T>
void elements(const QSampleArgs& a, int64_t begin, int64_t end) {
  using X = Values<T>;
  using Wide = typename Lanes<T>::Wide;
  const auto* signal = static_cast<const Wide*>(a.signal);
  const auto* sigma = static_cast<const Wide*>(a.sigma);
  while (begin < end) {
    const int64_t n = begin / a.image;
    const int64_t stop = end < (n + 1) * a.image ? end : (n + 1) * a.image;
    const T* x0 = static_cast<const T*>(a.x0) + begin;
    const T* noise = static_cast<const T*>(a.noise) + begin;
    T* out = static_cast<T*>(a.out) + begin;
    const X s(signal[a.t[n]]), e(sigma[a.t[n]]);
    for_values<T>(stop - begin, [&](int64_t i, int64_t count) FASTDIFF_HOT {
      fmadd(s, X::load(x0 + i, count), e * X::load(noise + i, count)).store(out + i, count);
    });
    begin = stop;
  }
}

template <class T>
void pieces(const QSampleFromSeedArgs& a, int64_t begin, int64_t end) {
  using X = Values<T>;
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
    const X s(signal[a.t[piece.n]]), e(sigma[a.t[piece.n]]);
    piece.for_runs(a.pieces, [&](int64_t offset, int64_t length, int64_t from) FASTDIFF_HOT {
      for_values<T>(length, [&](int64_t i, int64_t count) FASTDIFF_HOT {
        fmadd(s, X::load(x0 + offset + i, count), e * X::load_wide(z + from + i))
            .store(out + offset + i, count);
      });
    });
  }
}

}  // namespace

void q_sample(const QSampleArgs& a, int64_t begin, int64_t end) {
  for_floating(a.dtype, [&]<class T>() { elements<T>(a, begin, end); });
}

void q_sample_from_seed(const QSampleFromSeedArgs& a, int64_t begin, int64_t end) {
  for_floating(a.dtype, [&]<class T>() { pieces<T>(a, begin, end); });
}

}  // namespace fastdiff::CPU_CAPABILITY
