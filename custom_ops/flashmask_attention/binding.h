// Paddle's ernie5_flashmask_attention: Q [B,S,N,h], K, V [B,M,G,h], Intervals i32 [B,1 or G,M,c] -> Out [B,S,N,h],
// Lse f32 [B,N,S]; attributes causal, query_start, scale.
#pragma once

#include <cstdint>
#include <vector>

#include "flashmask_attention/flashmask_attention.h"
#include "paddle/extension.h"

namespace ernie5 {
namespace flashmask_attention_binding {

using paddle::DataType;
using paddle::Tensor;

struct Sizes {
  int64_t batch, rows, columns, heads, groups, head_dim, mask_heads, bounds, causal, query_start;
  float scale;
};

inline Sizes check(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& intervals, bool causal,
                   int64_t query_start, float scale) {
  auto a = q.shape(), b = k.shape(), m = intervals.shape();
  PD_CHECK(a.size() == 4 && b.size() == 4 && m.size() == 4 && v.shape() == b,
           "ernie5_flashmask_attention: q, k, v and intervals must have 4 axes, k and v the same");
  PD_CHECK(a[0] == b[0] && a[3] == b[3] && b[2] > 0 && a[2] % b[2] == 0,
           "ernie5_flashmask_attention: q and k differ in batch or head_dim, or N is no multiple of G");
  PD_CHECK(a[3] > 0 && a[3] % 8 == 0 && a[3] <= 256,
           "ernie5_flashmask_attention: head_dim must be 8, 16, ... 256, not ", a[3]);
  PD_CHECK(m[0] == a[0] && (m[1] == 1 || m[1] == b[2]) && m[2] == b[1],
           "ernie5_flashmask_attention: intervals must be [B, 1 or G, M, c]");
  PD_CHECK(causal ? m[3] == 1 || m[3] == 2 : m[3] == 2 || m[3] == 4,
           "ernie5_flashmask_attention: intervals hold 1 or 2 values a column when causal, else 2 or 4, not ", m[3]);
  PD_CHECK(intervals.dtype() == DataType::INT32 && q.dtype() == k.dtype() && q.dtype() == v.dtype() &&
               (q.dtype() == DataType::FLOAT32 || q.dtype() == DataType::BFLOAT16),
           "ernie5_flashmask_attention: intervals must be int32; q, k and v all float32 or all bfloat16");
  return {a[0], a[1], b[1], a[2], b[2], a[3], m[1], m[3], causal ? 1 : 0, query_start, scale};
}

inline Tensor workspace(const Sizes& s, const Tensor& like, bool backward) {
  int64_t floats = ernie5_flashmask_attention_workspace_size(s.batch, s.rows, s.columns, s.heads, s.groups, s.head_dim,
                                                             s.mask_heads, backward ? 1 : 0);
  return paddle::empty({floats > 0 ? floats : 1}, DataType::FLOAT32, like.place());
}

inline const uint16_t* halves(const Tensor& x) { return static_cast<const uint16_t*>(x.data()); }
inline uint16_t* halves(Tensor* x) { return static_cast<uint16_t*>(x->data()); }

inline std::vector<Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& intervals,
                                   bool causal, int64_t query_start, float scale) {
  Sizes s = check(q, k, v, intervals, causal, query_start, scale);
  Tensor out = paddle::empty(q.shape(), q.dtype(), q.place());
  Tensor lse = paddle::empty({s.batch, s.heads, s.rows}, DataType::FLOAT32, q.place());
  Tensor space = workspace(s, q, false);
  if (q.dtype() == DataType::FLOAT32) {
    ernie5_flashmask_attention_forward_cpu_f32(
        q.data<float>(), k.data<float>(), v.data<float>(), intervals.data<int32_t>(), s.batch, s.rows, s.columns,
        s.heads, s.groups, s.head_dim, s.mask_heads, s.bounds, s.causal, s.query_start, s.scale, out.data<float>(),
        lse.data<float>(), space.data<float>());
  } else {
    ernie5_flashmask_attention_forward_cpu_bf16(
        halves(q), halves(k), halves(v), intervals.data<int32_t>(), s.batch, s.rows, s.columns, s.heads, s.groups,
        s.head_dim, s.mask_heads, s.bounds, s.causal, s.query_start, s.scale, halves(&out), lse.data<float>(),
        space.data<float>());
  }
  return {out, lse};
}

inline std::vector<Tensor> backward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& intervals,
                                    const Tensor& out, const Tensor& lse, const Tensor& grad_out, bool causal,
                                    int64_t query_start, float scale) {
  Sizes s = check(q, k, v, intervals, causal, query_start, scale);
  Tensor grad_q = paddle::empty(q.shape(), q.dtype(), q.place());
  Tensor grad_k = paddle::empty(k.shape(), k.dtype(), k.place());
  Tensor grad_v = paddle::empty(v.shape(), v.dtype(), v.place());
  Tensor space = workspace(s, q, true);
  if (q.dtype() == DataType::FLOAT32) {
    ernie5_flashmask_attention_backward_cpu_f32(
        q.data<float>(), k.data<float>(), v.data<float>(), intervals.data<int32_t>(), out.data<float>(),
        lse.data<float>(), grad_out.data<float>(), s.batch, s.rows, s.columns, s.heads, s.groups, s.head_dim,
        s.mask_heads, s.bounds, s.causal, s.query_start, s.scale, grad_q.data<float>(), grad_k.data<float>(),
        grad_v.data<float>(), space.data<float>());
  } else {
    ernie5_flashmask_attention_backward_cpu_bf16(
        halves(q), halves(k), halves(v), intervals.data<int32_t>(), halves(out), lse.data<float>(), halves(grad_out),
        s.batch, s.rows, s.columns, s.heads, s.groups, s.head_dim, s.mask_heads, s.bounds, s.causal, s.query_start,
        s.scale, halves(&grad_q), halves(&grad_k), halves(&grad_v), space.data<float>());
  }
  return {grad_q, grad_k, grad_v};
}

using Shape = std::vector<int64_t>;
inline std::vector<Shape> forward_shapes(const Shape& q, const Shape&, const Shape&, const Shape&, bool, int64_t,
                                         float) {
  return {q, {q[0], q[2], q[1]}};
}
inline std::vector<DataType> forward_types(const DataType& q, const DataType&, const DataType&, const DataType&) {
  return {q, DataType::FLOAT32};
}
inline std::vector<Shape> backward_shapes(const Shape& q, const Shape& k, const Shape& v, const Shape&, const Shape&,
                                          const Shape&, const Shape&, bool, int64_t, float) {
  return {q, k, v};
}

}  // namespace flashmask_attention_binding
}  // namespace ernie5

PD_BUILD_OP(ernie5_flashmask_attention)
    .Inputs({"Q", "K", "V", "Intervals"})
    .Outputs({"Out", "Lse"})
    .Attrs({"causal: bool", "query_start: int64_t", "scale: float"})
    .SetKernelFn(PD_KERNEL(ernie5::flashmask_attention_binding::forward))
    .SetInferShapeFn(PD_INFER_SHAPE(ernie5::flashmask_attention_binding::forward_shapes))
    .SetInferDtypeFn(PD_INFER_DTYPE(ernie5::flashmask_attention_binding::forward_types));

PD_BUILD_GRAD_OP(ernie5_flashmask_attention)
    .Inputs({"Q", "K", "V", "Intervals", "Out", "Lse", paddle::Grad("Out")})
    .Outputs({paddle::Grad("Q"), paddle::Grad("K"), paddle::Grad("V")})
    .Attrs({"causal: bool", "query_start: int64_t", "scale: float"})
    .SetKernelFn(PD_KERNEL(ernie5::flashmask_attention_binding::backward))
    .SetInferShapeFn(PD_INFER_SHAPE(ernie5::flashmask_attention_binding::backward_shapes));
