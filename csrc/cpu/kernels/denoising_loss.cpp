// loss[n] = weight[t] mean (prediction - p[t] x_0 - q[t] z)^2 over image n, and its gradient
// grad[n] 2 weight[t] / size (prediction - p[t] x_0 - q[t] z), rounded once.
//
// For predictions of S bytes the loss reads 3 S, and the gradient reads 3 S and writes 1 S, the
// least possible. Each reads 1 S less without x_0 in the target, and 1 S less without z or where z
// is computed from a counter (kernels/philox.h). The target is never stored. Neither is noise from
// a counter: a piece's noise is in a buffer on the stack, computed for the loss and again for the
// gradient.
//
// A piece is summed in four vectors, the pieces of an image in double and in their order, so that
// the sum does not depend on who computes which.
#include "cpu/kernels/denoising_loss.h"

#include "cpu/kernels/dtypes.h"
#include "cpu/kernels/noise.h"

namespace fastdiff::CPU_CAPABILITY {
namespace {

enum class Noise { None, Given, FromSeed };

// What is left of the prediction, for the elements of one image from `offset` on.
template <class T, bool kX0, Noise kNoise>
struct Errors {
  using X = Values<T>;
  using V = typename Lanes<T>::V;
  using Wide = typename Lanes<T>::Wide;
  V minus_p, minus_q;
  const T *prediction, *x0, *noise;

  Errors(const DenoisingLossArgs& a, int64_t n)
      : minus_p(fill_lanes<V>(-static_cast<const Wide*>(a.of_x0)[a.t[n]])),
        minus_q(fill_lanes<V>(-static_cast<const Wide*>(a.of_noise)[a.t[n]])) {
    const int64_t first = n * a.pieces.channels * a.pieces.pixels;
    prediction = static_cast<const T*>(a.prediction) + first;
    if constexpr (kX0) x0 = static_cast<const T*>(a.x0) + first;
    if constexpr (kNoise == Noise::Given) noise = static_cast<const T*>(a.noise) + first;
  }

  // The errors of elements offset..offset+count-1 of the image. z is their noise from a seed.
  FASTDIFF_INLINE X at(int64_t offset, int64_t count, const Wide* z) const {
    X e = X::load(prediction + offset, count);
    if constexpr (kX0) e = fmadd(minus_p, X::load(x0 + offset, count), e);
    if constexpr (kNoise == Noise::Given) e = fmadd(minus_q, X::load(noise + offset, count), e);
    if constexpr (kNoise == Noise::FromSeed) e = fmadd(minus_q, X::load_wide(z), e);
    return e;
  }
};

// The noise of a piece where it is that of a seed, else null.
template <Noise kNoise, class Wide>
FASTDIFF_INLINE const Wide* seeded_noise(const DenoisingLossArgs& a, const Piece& piece,
                                         NoiseBuffer<Wide>& buffer) {
  if constexpr (kNoise != Noise::FromSeed) return nullptr;
  return noise_of(a.pieces, piece, PhiloxStream(a.seed + 2 * piece.n, a.row), buffer);
}

// Squares added up, in vectors that do not wait for each other.
template <class T>
struct Squares {
  static constexpr int kChains = 4 / Lanes<T>::vectors;
  Values<T> sums[kChains];

  Squares() {
    for (auto& sum : sums) sum = Values<T>(0);
  }

  FASTDIFF_INLINE void add(int chain, const Values<T>& e) {
    sums[chain] = fmadd(e, e, sums[chain]);
  }

  double total() {
    typename Lanes<T>::V all{};
    for (const auto& sum : sums)
      for (const auto& vector : sum.vector) all += vector;
    return sum_lanes(all);
  }
};

template <class T, bool kX0, Noise kNoise>
void sum(const DenoisingLossArgs& a, double* sums, int64_t begin, int64_t end) {
  constexpr int64_t size = Lanes<T>::size, step = Squares<T>::kChains * size;
  NoiseBuffer<typename Lanes<T>::Wide> buffer;
  for (int64_t index = begin; index < end; ++index) {
    const Piece piece(a.pieces, index);
    const Errors<T, kX0, kNoise> errors(a, piece.n);
    const auto* z = seeded_noise<kNoise>(a, piece, buffer);
    Squares<T> squares;
    piece.for_runs(a.pieces, [&](int64_t offset, int64_t length, int64_t from) FASTDIFF_HOT {
      int64_t i = 0;
      for (; i + step <= length; i += step)
        for (int c = 0; c < Squares<T>::kChains; ++c)
          squares.add(c, errors.at(offset + i + c * size, size, z + from + i + c * size));
      for (; i < length; i += size) {
        const int64_t count = length - i < size ? length - i : size;
        auto e = errors.at(offset + i, count, z + from + i);
        e.keep(count);
        squares.add(0, e);
      }
    });
    sums[index] = squares.total();
  }
}

template <class T, bool kX0, Noise kNoise>
void differentiate(const DenoisingLossArgs& a, const void* grad, void* out, int64_t begin,
                   int64_t end) {
  using Wide = typename Lanes<T>::Wide;
  const int64_t image = a.pieces.channels * a.pieces.pixels;
  NoiseBuffer<Wide> buffer;
  for (int64_t index = begin; index < end; ++index) {
    const Piece piece(a.pieces, index);
    const Errors<T, kX0, kNoise> errors(a, piece.n);
    const auto* z = seeded_noise<kNoise>(a, piece, buffer);
    const double weight = static_cast<const Wide*>(a.weight)[a.t[piece.n]];
    const double of_loss = static_cast<const Wide*>(grad)[piece.n];
    const Values<T> factor(static_cast<Wide>(of_loss * 2 * weight / static_cast<double>(image)));
    T* to = static_cast<T*>(out) + piece.n * image;
    piece.for_runs(a.pieces, [&](int64_t offset, int64_t length, int64_t from) FASTDIFF_HOT {
      for_values<T>(length, [&](int64_t i, int64_t count) FASTDIFF_HOT {
        const auto e = errors.at(offset + i, count, z + from + i);
        (factor * e).store(to + offset + i, count);
      });
    });
  }
}

// Calls body.template operator()<T>(x0, noise) with the prediction's type and what the target
// consists of, as constants.
template <class Body>
FASTDIFF_INLINE void for_target(const DenoisingLossArgs& a, Body&& body) {
  const auto noises = [&]<class T>(auto x0) {
    const auto call = [&](auto noise) { body.template operator()<T>(x0, noise); };
    if (a.noise) return call(std::integral_constant<Noise, Noise::Given>());
    if (a.seed) return call(std::integral_constant<Noise, Noise::FromSeed>());
    return call(std::integral_constant<Noise, Noise::None>());
  };
  for_floating(a.dtype, [&]<class T>() {
    if (a.x0) return noises.template operator()<T>(std::true_type());
    return noises.template operator()<T>(std::false_type());
  });
}

}  // namespace

void denoising_loss(const DenoisingLossArgs& a, double* sums, int64_t begin, int64_t end) {
  for_target(a, [&]<class T>(auto x0, auto noise) {
    sum<T, decltype(x0)::value, decltype(noise)::value>(a, sums, begin, end);
  });
}

void denoising_loss_backward(const DenoisingLossArgs& a, const void* grad, void* out, int64_t begin,
                             int64_t end) {
  for_target(a, [&]<class T>(auto x0, auto noise) {
    differentiate<T, decltype(x0)::value, decltype(noise)::value>(a, grad, out, begin, end);
  });
}

}  // namespace fastdiff::CPU_CAPABILITY
