// fastdiff::attention and its gradients on CPU tensors; the arithmetic is in
// kernels/attention*.cpp.
#include "cpu/kernels/attention.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "cpu/kernels/attention_backward.h"
#include "cpu/parallel.h"
#include "cpu/tensors.h"

namespace fastdiff {
namespace {

// x with rows whose elements lie side by side, and its strides of B, H and L.
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

void check(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
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
}

// The result, and Attention::statistics unless that is null.
at::Tensor attend(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, double scale,
                  float* statistics) {
  Attention p{.dtype = q.scalar_type(),
              .batch = q.size(0),
              .heads = q.size(1),
              .queries = q.size(2),
              .keys = k.size(2),
              .width = q.size(3),
              .value_width = v.size(3),
              .statistics = statistics,
              .scale = static_cast<float>(scale)};
  auto out = at::empty({p.batch, p.queries, p.heads, p.value_width}, q.options());
  if (q.size(0) == 0 || p.heads == 0 || p.queries == 0 || (p.value_width == 0 && !statistics))
    return out.transpose(1, 2);
  const auto q_held = neighbouring(q, p.q_strides), k_held = neighbouring(k, p.k_strides),
             v_held = neighbouring(v, p.v_strides);
  p.q = q_held.const_data_ptr();
  p.k = k_held.const_data_ptr();
  p.v = v_held.const_data_ptr();
  p.out = out.mutable_data_ptr();
  const int64_t heads = p.batch * p.heads;
  const Method method = choose(p.dtype);
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

at::Tensor attention_cpu(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                         double scale) {
  check(q, k, v);
  return attend(q, k, v, scale, nullptr);
}

std::tuple<at::Tensor, at::Tensor> attention_forward_cpu(const at::Tensor& q, const at::Tensor& k,
                                                         const at::Tensor& v, double scale) {
  check(q, k, v);
  auto statistics = at::empty({2, q.size(0), q.size(1), q.size(2)}, q.options().dtype(at::kFloat));
  auto out = attend(q, k, v, scale, statistics.mutable_data_ptr<float>());
  return {out, statistics};
}

// Into how many shares the blocks of keys of a head are divided, by sizes alone: so that there are
// units for this many threads, as each share costs the sums of a dq in float32.
int64_t shares(int64_t heads, int64_t keys) {
  constexpr int64_t kUnits = 16;
  return std::clamp<int64_t>(kUnits / std::max<int64_t>(heads, 1), 1, key_blocks(keys));
}

// Writes the gradients into dq, dk and dv, [B, H, rows, columns] views with neighbouring columns.
void differentiate(const at::Tensor& dout, const at::Tensor& q, const at::Tensor& k,
                   const at::Tensor& v, const at::Tensor& out, const at::Tensor& statistics,
                   double scale, const at::Tensor& dq, const at::Tensor& dk, const at::Tensor& dv) {
  AttentionBackward p{.dtype = q.scalar_type(),
                      .batch = q.size(0),
                      .heads = q.size(1),
                      .queries = q.size(2),
                      .keys = k.size(2),
                      .width = q.size(3),
                      .value_width = v.size(3),
                      .scale = static_cast<float>(scale)};
  const int64_t heads = p.batch * p.heads;
  if (heads == 0) return;
  if (p.queries == 0) {
    dk.zero_();
    dv.zero_();
    return;
  }
  at::Tensor held[5];
  const auto read = [&](int i, const at::Tensor& x, HeadRows<const void*>& rows) {
    held[i] = neighbouring(x, rows.strides);
    rows.data = held[i].const_data_ptr();
  };
  read(0, dout, p.dout);
  read(1, q, p.q);
  read(2, k, p.k);
  read(3, v, p.v);
  read(4, out, p.out);
  const auto dense = statistics.contiguous();
  p.statistics = dense.const_data_ptr<float>();
  const auto write = [](const at::Tensor& x, HeadRows<void*>& rows) {
    rows.data = x.mutable_data_ptr();
    for (int d = 0; d < 3; ++d) rows.strides[d] = x.stride(d);
  };
  write(dq, p.dq);
  write(dk, p.dk);
  write(dv, p.dv);
  p.shares = shares(heads, p.keys);
  at::Tensor sums;
  if (p.shares > 1) {
    sums = at::empty({heads, p.shares, attention_backward_sums(p.queries, p.width)},
                     statistics.options());
    p.sums = sums.mutable_data_ptr<float>();
  }
  auto kernel = FASTDIFF_KERNEL(attention_backward);
  if (p.dtype == at::kBFloat16 && FASTDIFF_BF16_KERNEL(attention_backward_bf16))
    kernel = FASTDIFF_BF16_KERNEL(attention_backward_bf16);
  for_each_unit(heads * p.shares, [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
  if (p.shares > 1)
    for_each_unit(heads * query_blocks(p.queries), [&](int64_t begin, int64_t end) {
      FASTDIFF_KERNEL(attention_backward_dq)(p, begin, end);
    });
}

void check_backward(const at::Tensor& dout, const at::Tensor& q, const at::Tensor& k,
                    const at::Tensor& v, const at::Tensor& out, const at::Tensor& statistics) {
  check(q, k, v);
  const auto type = q.scalar_type();
  check_tensor(dout, {q.size(0), q.size(1), q.size(2), v.size(3)}, type, "dout");
  check_tensor(out, {q.size(0), q.size(1), q.size(2), v.size(3)}, type, "out");
  check_tensor(statistics, {2, q.size(0), q.size(1), q.size(2)}, at::kFloat, "statistics");
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> attention_backward_cpu(
    const at::Tensor& dout, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
    const at::Tensor& out, const at::Tensor& statistics, double scale) {
  check_backward(dout, q, k, v, out, statistics);
  const auto like = [](const at::Tensor& x) {
    return at::empty({x.size(0), x.size(2), x.size(1), x.size(3)}, x.options()).transpose(1, 2);
  };
  auto dq = like(q), dk = like(k), dv = like(v);
  differentiate(dout, q, k, v, out, statistics, scale, dq, dk, dv);
  return {dq, dk, dv};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastdiff, CPU, m) {
  m.impl("attention", attention_cpu);
  m.impl("attention_forward", attention_forward_cpu);
  m.impl("attention_backward", attention_backward_cpu);
}

}  // namespace fastdiff
