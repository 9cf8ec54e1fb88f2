// denoising_loss with noise that is drawn here from a seed, forward and backward alike.
//
// Reads 2 S for images of S bytes (1 S without x0), and backward writes 1 S, where noise in memory
// would be read once more by each, after it was written. A value takes about 55 instructions, so
// that arithmetic is as likely a limit as the memory. Which elements a thread takes is drawn_unit's
// business, the rest is denoising_loss.cu's.
#include "cuda/denoising_loss.cuh"

namespace fastdiff::cuda {
namespace {

template <class T, class F>
void for_unit(const DenoisingLossArgs& a, const void* dprediction, F f) {
  for_drawn_unit<T>(a.channels_last, a.channels, a.pixels,
                    common_alignment(a.prediction, a.x0, dprediction), f);
}

}  // namespace

int64_t loss_from_seed(const DenoisingLossArgs& a, int64_t pieces, float* loss, float* sums,
                       Stream stream) {
  int64_t found = 0;
  for_dtype(a.dtype, [&](auto tag) {
    using T = decltype(tag);
    for_unit<T>(a, nullptr, [&](auto width, auto form, const DrawnImage& image) {
      found = launch_loss<T, decltype(width)::value, true, decltype(form)::value>(
          a, image, pieces, loss, sums, stream);
    });
  });
  return found;
}

void loss_from_seed_backward(const DenoisingLossArgs& a, const float* grad, void* dprediction,
                             Stream stream) {
  for_dtype(a.dtype, [&](auto tag) {
    using T = decltype(tag);
    for_unit<T>(a, dprediction, [&](auto width, auto form, const DrawnImage& image) {
      launch_backward<T, decltype(width)::value, true, decltype(form)::value>(a, image, grad,
                                                                              dprediction, stream);
    });
  });
}

}  // namespace fastdiff::cuda
