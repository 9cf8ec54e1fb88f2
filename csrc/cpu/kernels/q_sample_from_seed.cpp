// x_t = signal[t] x_0 + sigma[t] z, with z drawn from a counter (kernels/philox.h).
// Reads 1 S and writes 1 S for images of S bytes, which is the least there is: the noise of a piece
// is drawn into a buffer on the stack, in the wide type, and goes nowhere else.
#include "cpu/kernels/q_sample_from_seed.h"

#include "cpu/kernels/drawn.h"

namespace fastdiff::CPU_CAPABILITY {

template <class T>
static void run(const QSampleFromSeedArgs& a, int64_t begin, int64_t end) {
  using B = Block<T>;
  using Wide = typename Lanes<T>::Wide;
  const int64_t image = a.pieces.channels * a.pieces.pixels;
  const auto* signal = static_cast<const Wide*>(a.signal);
  const auto* sigma = static_cast<const Wide*>(a.sigma);
  Drawn<Wide> buffer;
  for (int64_t index = begin; index < end; ++index) {
    const Piece piece(a.pieces, index);
    const PhiloxStream stream(a.seed + 2 * piece.n, a.row);
    const Wide* z = draw(a.pieces, piece, stream, buffer);
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
  for_dtype(a.dtype, [&](auto* tag) { run<std::remove_pointer_t<decltype(tag)>>(a, begin, end); });
}

}  // namespace fastdiff::CPU_CAPABILITY
