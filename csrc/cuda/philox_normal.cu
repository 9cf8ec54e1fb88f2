// Standard normal values from counters (philox.cuh), one stream per image.
//
// out is [N, image], contiguous. Writes S for noise of S bytes, the minimum, and reads two numbers
// per image. A thread computes as many values as a 16-byte store holds, one counter for each four,
// so no counter is computed twice. A value takes about 55 instructions, so arithmetic is as likely
// a limit as memory.
#include "cuda/access.cuh"
#include "cuda/philox.cuh"
#include "cuda/philox_normal.h"

namespace fastdiff::cuda {
namespace {

template <class T, int W>
__global__ void __launch_bounds__(kThreads) philox_normal_kernel(PhiloxNormalArgs a) {
  constexpr int kUnit = kWidth<T>;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * kUnit;
  if (first >= a.image) return;
#pragma unroll 1
  for (int64_t n = blockIdx.y; n < a.images; n += gridDim.y) {
    const PhiloxStream stream(a.seed + 2 * n, a.row);
    T* out = static_cast<T*>(a.out) + n * a.image + first;
    float z[kUnit / 4][4];
#pragma unroll
    for (int q = 0; q < kUnit / 4; ++q) stream.normal(first / 4 + q, z[q]);
#pragma unroll
    for (int i = 0; i < kUnit; i += W) {
      if (W < kUnit && first + i >= a.image) break;
      Pack<T, W> pack;
#pragma unroll
      for (int j = 0; j < W; ++j) pack.value[j] = from_float<T>(z[(i + j) / 4][(i + j) % 4]);
      store(out + i, pack);
    }
  }
}

}  // namespace

void philox_normal_cuda(const PhiloxNormalArgs& a, Stream stream) {
  for_dtype(a.dtype, [&](auto tag) {
    using T = decltype(tag);
    const FlatPlan plan = flat_plan(ceil_div(a.image, kWidth<T>), a.images, 1);
    for_width<T>(common_alignment(a.out, a.image * sizeof(T)), [&](auto width) {
      FASTDIFF_LAUNCH(philox_normal_kernel<T, decltype(width)::value>, plan.grid, plan.threads, 0,
                      stream, a);
    });
  });
}

}  // namespace fastdiff::cuda
