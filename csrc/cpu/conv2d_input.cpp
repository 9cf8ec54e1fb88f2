#include "cpu/conv2d_input.h"

#include <ATen/Parallel.h>

#include "cpu/parallel.h"
#include "cpu/tensors.h"

namespace fastdiff {

Threads conv2d_threads() {
  return {at::in_parallel_region() ? 1 : at::get_num_threads(),
          [](int64_t units, Threads::Body body, void* context) {
            for_each_unit(units, [&](int64_t begin, int64_t end) { body(context, begin, end); });
          }};
}

ConvInput::ConvInput(const ConvSpec& spec, const at::Tensor& x, const OptionalTensor& skip,
                     const OptionalTensor& norm)
    : p{spec}, x_(x), skip_(skip), norm_(norm) {
  const auto type = x.scalar_type();
  check_device(x, at::kCPU, "x");
  TORCH_CHECK_VALUE(x.dim() == 4, "x must be [N, C, H, W], got ", x.sizes());
  const int64_t n = x.size(0), h = x.size(2), w = x.size(3);
  int64_t channels = x.size(1);
  if (skip) {
    TORCH_CHECK_VALUE(skip->dim() == 4, "skip must be [N, C, H, W], got ", skip->sizes());
    check_tensor(*skip, {n, skip->size(1), h, w}, type, "skip");
    channels += skip->size(1);
  }
  TORCH_CHECK_VALUE(spec.channels == channels, "a weight for ", spec.channels,
                    " channels does not fit an input of ", channels);
  const int64_t up = spec.upsample ? 2 : 1;
  const int64_t tall = up * h + spec.top + spec.bottom, wide = up * w + spec.left + spec.right;
  TORCH_CHECK_VALUE(h >= 1 && w >= 1 && tall >= spec.kernel_h && wide >= spec.kernel_w,
                    "an input of ", x.sizes(), " is smaller than the kernel, ", spec.kernel_h,
                    " by ", spec.kernel_w);
  if (norm) check_tensor(*norm, {n, 2, channels}, at::kFloat, "norm");
  p.dtype = type;
  p.images = n;
  p.height = h;
  p.width = w;
  p.x_channels = x.size(1);
  p.out_height = (tall - spec.kernel_h) / spec.stride_h + 1;
  p.out_width = (wide - spec.kernel_w) / spec.stride_w + 1;
  p.threads = conv2d_threads();
}

void ConvInput::hold() {
  x_ = by_pixel(x_, &p.x_ld);
  p.x = x_.const_data_ptr();
  if (skip_) p.skip = (skip_ = by_pixel(*skip_, &p.skip_ld))->const_data_ptr();
  if (norm_) p.norm = (norm_ = norm_->contiguous())->const_data_ptr<float>();
}

}  // namespace fastdiff
