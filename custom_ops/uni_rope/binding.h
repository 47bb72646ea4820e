// Paddle's ernie5_uni_rope: Q [B,S,N*h], K [B,S,G*h], Cos, Sin f32 [B,S,h/2] -> QOut, KOut.
#pragma once

#include <cstdint>
#include <vector>

#include "common/binding.h"
#include "uni_rope/uni_rope.h"
#ifdef PADDLE_WITH_CUDA
#include "uni_rope/uni_rope_cuda.h"
#endif

namespace ernie5 {
namespace uni_rope_binding {

using binding::data;
using paddle::Tensor;

inline std::vector<Tensor> turn(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin, float sign) {
  PD_CHECK(q.shape().size() == 3 && k.shape().size() == 3 && cos.shape().size() == 3,
           "ernie5_uni_rope: q, k, cos and sin must have 3 axes");
  int64_t batch = q.shape()[0], length = q.shape()[1], half = cos.shape()[2], dim = 2 * half;
  PD_CHECK(half > 0 && q.shape()[2] % dim == 0 && k.shape()[2] % dim == 0,
           "ernie5_uni_rope: the last axis of q and k must be a multiple of head_dim = 2 * ", half);
  PD_CHECK(k.shape()[0] == batch && k.shape()[1] == length && cos.shape()[0] == batch && cos.shape()[1] == length &&
               sin.shape() == cos.shape(),
           "ernie5_uni_rope: q, k, cos and sin differ in their first two axes");
  PD_CHECK(cos.dtype() == paddle::DataType::FLOAT32 && sin.dtype() == paddle::DataType::FLOAT32 &&
               q.dtype() == k.dtype(),
           "ernie5_uni_rope: cos and sin must be float32, q and k of one type");
  PD_CHECK(q.dtype() == paddle::DataType::FLOAT32 || q.dtype() == paddle::DataType::BFLOAT16,
           "ernie5_uni_rope: q and k must be float32 or bfloat16");
  binding::check_place("ernie5_uni_rope", q, {&k, &cos, &sin});
  Tensor q_out = paddle::empty(q.shape(), q.dtype(), q.place()), k_out = paddle::empty(k.shape(), k.dtype(), k.place());
  int64_t heads = q.shape()[2] / dim, groups = k.shape()[2] / dim;
  auto run = [&](auto zero, auto launcher, auto... more) {
    using T = decltype(zero);
    return launcher(data<T>(q), data<T>(k), data<float>(cos), data<float>(sin), batch * length, heads, groups, dim,
                    sign, data<T>(q_out), data<T>(k_out), more...);
  };
#ifdef PADDLE_WITH_CUDA
  if (q.is_gpu()) {
    binding::launch("uni_rope", q, run, ernie5_uni_rope_cuda_f32, ernie5_uni_rope_cuda_bf16);
    return {q_out, k_out};
  }
#endif
  binding::by_type(q, run, ernie5_uni_rope_cpu_f32, ernie5_uni_rope_cpu_bf16);
  return {q_out, k_out};
}

inline std::vector<Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin) {
  return turn(q, k, cos, sin, 1.0f);
}

inline std::vector<Tensor> backward(const Tensor& cos, const Tensor& sin, const Tensor& grad_q, const Tensor& grad_k) {
  PD_CHECK(grad_q.initialized() && grad_k.initialized(), "ernie5_uni_rope: both outputs must take part in the loss");
  return turn(grad_q, grad_k, cos, sin, -1.0f);
}

using Shape = std::vector<int64_t>;
inline std::vector<Shape> forward_shapes(const Shape& q, const Shape& k, const Shape&, const Shape&) { return {q, k}; }
inline std::vector<paddle::DataType> forward_types(const paddle::DataType& q, const paddle::DataType& k,
                                                   const paddle::DataType&, const paddle::DataType&) {
  return {q, k};
}
inline std::vector<Shape> backward_shapes(const Shape&, const Shape&, const Shape& grad_q, const Shape& grad_k) {
  return {grad_q, grad_k};
}

}  // namespace uni_rope_binding
}  // namespace ernie5

PD_BUILD_OP(ernie5_uni_rope)
    .Inputs({"Q", "K", "Cos", "Sin"})
    .Outputs({"QOut", "KOut"})
    .SetKernelFn(PD_KERNEL(ernie5::uni_rope_binding::forward))
    .SetInferShapeFn(PD_INFER_SHAPE(ernie5::uni_rope_binding::forward_shapes))
    .SetInferDtypeFn(PD_INFER_DTYPE(ernie5::uni_rope_binding::forward_types));

PD_BUILD_GRAD_OP(ernie5_uni_rope)
    .Inputs({"Cos", "Sin", paddle::Grad("QOut"), paddle::Grad("KOut")})
    .Outputs({paddle::Grad("Q"), paddle::Grad("K")})
    .SetKernelFn(PD_KERNEL(ernie5::uni_rope_binding::backward))
    .SetInferShapeFn(PD_INFER_SHAPE(ernie5::uni_rope_binding::backward_shapes));
