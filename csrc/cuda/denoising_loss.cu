// loss_n = weight[t] mean((prediction - target_x0[t] x0 - target_noise[t] z)^2) of each image n,
// and its gradient in the prediction.
//
// With x0 and z given, forward reads 3 S for images of S bytes, backward reads 3 S and writes 1 S,
// which is the least there is; what is not given is not read. The tensors share a layout, whichever
// it is, and are walked flat.
//
// Forward is one kernel where a block can take a whole image, or a part of a warp a small one. An
// image that a block would read for longer than another kernel takes to start, while most
// processors idle, is cut into pieces, and a second kernel adds up their sums of squares. Each
// thread adds up squares vector by vector, then lanes and warps are added in a tree: float32 is
// enough for that, and the order depends on shapes alone.
#include "cuda/denoising_loss.cuh"

namespace fastdiff::cuda {
namespace {

constexpr int kCombineThreads = 128;  // a warp an image
constexpr int kEach = 2;              // vectors a thread, where there are many: of three tensors

__global__ void __launch_bounds__(kCombineThreads)
    combine(DenoisingLossArgs a, const float* sums, int64_t pieces, float* loss) {
  const int64_t n = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
  if (n >= a.images) return;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  float sum = 0;
  for (int64_t i = lane; i < pieces; i += 32) sum += load_one(sums + n * pieces + i);
  sum = warp_sum(sum);
  if (lane != 0) return;
  const int64_t t = load_one(a.t + n);
  const bool known = t >= 0 && t < a.steps;
  const float weight = known ? load_one(a.weight + t) : __int_as_float(0x7fffffff);
  store_one(loss + n, image_loss(weight, sum, a.channels * a.pixels));
}

// Calls f(T{}, width, each, image) for units of given noise, W and Each as integral constants.
template <class F>
void for_flat_unit(const DenoisingLossArgs& a, const void* dprediction, int64_t pieces, F f) {
  for_dtype(a.dtype, [&](auto tag) {
    using T = decltype(tag);
    const int64_t size = a.channels * a.pixels;
    const int64_t alignment =
        common_alignment(a.prediction, a.x0, a.noise, dprediction, size * sizeof(T));
    for_width<T>(alignment, [&](auto width) {
      const FlatImage image{size / width};
      if (a.images * image.units >= kManyVectors || image.units >= kEach * kThreads * pieces)
        f(tag, width, std::integral_constant<int, kEach>{}, image);
      else
        f(tag, width, std::integral_constant<int, 1>{}, image);
    });
  });
}

}  // namespace

int64_t denoising_loss_workspace(const DenoisingLossArgs& a) {
  const int64_t pieces = a.images > 0 ? most_pieces(a) : 1;
  return pieces > 1 ? a.images * pieces * static_cast<int64_t>(sizeof(float)) : 0;
}

void denoising_loss_cuda(const DenoisingLossArgs& a, float* loss, void* workspace, Stream stream) {
  if (a.images == 0) return;
  auto* sums = static_cast<float*>(workspace);
  int64_t pieces = most_pieces(a);
  if (a.seed) {
    pieces = loss_from_seed(a, pieces, loss, sums, stream);
  } else {
    for_flat_unit(a, nullptr, pieces, [&](auto tag, auto width, auto each, const FlatImage& image) {
      pieces = launch_loss<decltype(tag), decltype(width)::value, false, decltype(each)::value>(
          a, image, pieces, loss, sums, stream);
    });
  }
  if (pieces == 1) return;
  const auto blocks = static_cast<unsigned>(ceil_div(a.images * 32, kCombineThreads));
  FASTDIFF_LAUNCH(combine, dim3(blocks), kCombineThreads, 0, stream, a, sums, pieces, loss);
}

void denoising_loss_backward_cuda(const DenoisingLossArgs& a, const float* grad, void* dprediction,
                                  Stream stream) {
  if (a.seed) return loss_from_seed_backward(a, grad, dprediction, stream);
  for_flat_unit(a, dprediction, 1, [&](auto tag, auto width, auto each, const FlatImage& image) {
    launch_backward<decltype(tag), decltype(width)::value, false, decltype(each)::value>(
        a, image, grad, dprediction, stream);
  });
}

}  // namespace fastdiff::cuda
