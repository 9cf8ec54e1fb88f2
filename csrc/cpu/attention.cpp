#include "cpu/kernels/attention.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "cpu/parallel.h"
#include "cpu/tensors.h"

namespace fastdiff {
namespace {

at::Tensor neighbouring(const at::Tensor& x, int64_t (&strides)[3]) {
  const auto out = x.stride(3) == 1 || x.size(3) == 1 ? x : x.contiguous();
  for (int d = 0; d < 3; ++d) strides[d] = out.stride(d);
  return out;
}

// Kernels, what they pack keys or values of a width into, and the queries of their units.
struct Method {
  void (*pack)(const Attention&, int64_t, int64_t);
  void (*attend)(const Attention&, int64_t, int64_t);
  int64_t (*packed)(int64_t keys, int64_t width);
  at::ScalarType packed_dtype;
  int64_t queries;
};

Method choose(at::ScalarType type) {
  if (type == at::kBFloat16 && FASTDIFF_BF16_KERNEL(attention_bf16))
    return {FASTDIFF_BF16_KERNEL(attention_bf16_pack), FASTDIFF_BF16_KERNEL(attention_bf16),
            attention_bf16_packed, at::kBFloat16, kBf16Queries};
  return {FASTDIFF_KERNEL(attention_pack), FASTDIFF_KERNEL(attention), attention_packed, at::kFloat,
          kQueries};
}

at::Tensor attention_cpu(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                         double scale) {
  const auto type = q.scalar_type();
  check_float_or_bfloat16(q, "q");
  TORCH_CHECK_VALUE(q.dim() == 4 && k.dim() == 4 && v.dim() == 4,
                    "q, k and v must be [B, H, L, D], got ", q.sizes(), ", ", k.sizes(), " and ",
                    v.sizes());
  check_tensor(k, {q.size(0), q.size(1), k.size(2), q.size(3)}, type, "k");
  check_tensor(v, {q.size(0), q.size(1), k.size(2), v.size(3)}, type, "v");
  TORCH_CHECK_VALUE(k.size(2) >= 1, "there must be one key at least, got k of ", k.sizes());
  for (const auto size : {k.size(2), q.size(3), v.size(3)})
    TORCH_CHECK_VALUE(size < int64_t{1} << 31, "keys and widths must be under 2^31, got ", size);
  Attention p{.dtype = type,
              .batch = q.size(0),
              .heads = q.size(1),
              .queries = q.size(2),
              .keys = k.size(2),
              .width = q.size(3),
              .value_width = v.size(3),
              .scale = static_cast<float>(scale)};
  auto out = at::empty({p.batch, p.queries, p.heads, p.value_width}, q.options());
  if (out.numel() == 0) return out.transpose(1, 2);
  const auto q_held = neighbouring(q, p.q_strides), k_held = neighbouring(k, p.k_strides),
             v_held = neighbouring(v, p.v_strides);
  p.q = q_held.const_data_ptr();
  p.k = k_held.const_data_ptr();
  p.v = v_held.const_data_ptr();
  p.out = out.mutable_data_ptr();
  const int64_t heads = p.batch * p.heads;
  const Method method = choose(type);
  const auto packed = [&](int64_t width) {
    return at::empty({heads, method.packed(p.keys, width)}, q.options().dtype(method.packed_dtype));
  };
  auto packed_k = packed(p.width), packed_v = packed(p.value_width);
  p.packed_k = packed_k.mutable_data_ptr();
  p.packed_v = packed_v.mutable_data_ptr();
  for_each_unit(heads, [&](int64_t begin, int64_t end) { method.pack(p, begin, end); });
  for_each_unit(heads * ((p.queries + method.queries - 1) / method.queries),
                [&](int64_t begin, int64_t end) { method.attend(p, begin, end); });
  return out.transpose(1, 2);
}

}  // namespace

TORCH_LIBRARY_IMPL(fastdiff, CPU, m) { m.impl("attention", attention_cpu); }

}  // namespace fastdiff
