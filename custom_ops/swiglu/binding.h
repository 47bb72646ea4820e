// Paddle's ernie5_swiglu: Hidden [..., 2F], gate first -> Out [..., F], silu(gate) * up.
#pragma once

#include <cstdint>
#include <vector>

#include "common/binding.h"
#include "paddle/extension.h"
#include "swiglu/swiglu.h"

namespace ernie5 {
namespace swiglu_binding {

using paddle::DataType;
using paddle::Tensor;
using Shape = std::vector<int64_t>;

inline Shape halved(Shape shape) {
  if (shape.back() > 0) shape.back() /= 2;
  return shape;
}

inline int64_t check(const Tensor& hidden) {
  PD_CHECK(hidden.is_cpu(), "ernie5_swiglu takes tensors on the CPU");
  PD_CHECK(!hidden.shape().empty() && hidden.shape().back() > 0 && hidden.shape().back() % 2 == 0,
           "ernie5_swiglu: the last axis holds gate and up, so it is even");
  PD_CHECK(hidden.dtype() == DataType::FLOAT32 || hidden.dtype() == DataType::BFLOAT16,
           "ernie5_swiglu takes float32 or bfloat16");
  return hidden.shape().back() / 2;
}

inline std::vector<Tensor> forward(const Tensor& hidden) {
  const int64_t width = check(hidden), rows = hidden.numel() / (2 * width);
  Tensor out = paddle::empty(halved(hidden.shape()), hidden.dtype(), hidden.place());
  auto run = [&](auto zero, auto launcher) {
    using T = decltype(zero);
    launcher(binding::data<T>(hidden), rows, width, binding::data<T>(out));
  };
  binding::by_type(hidden, run, ernie5_swiglu_forward_cpu_f32, ernie5_swiglu_forward_cpu_bf16);
  return {out};
}

inline std::vector<Tensor> backward(const Tensor& hidden, const Tensor& grad_out) {
  const int64_t width = check(hidden), rows = hidden.numel() / (2 * width);
  PD_CHECK(grad_out.shape() == halved(hidden.shape()) && grad_out.dtype() == hidden.dtype(),
           "ernie5_swiglu: the gradient must have the shape and type of the result");
  Tensor grad = paddle::empty(hidden.shape(), hidden.dtype(), hidden.place());
  auto run = [&](auto zero, auto launcher) {
    using T = decltype(zero);
    launcher(binding::data<T>(hidden), binding::data<T>(grad_out), rows, width, binding::data<T>(grad));
  };
  binding::by_type(hidden, run, ernie5_swiglu_backward_cpu_f32, ernie5_swiglu_backward_cpu_bf16);
  return {grad};
}

inline std::vector<Shape> forward_shapes(const Shape& hidden) { return {halved(hidden)}; }
inline std::vector<DataType> forward_types(const DataType& hidden) { return {hidden}; }

}  // namespace swiglu_binding
}  // namespace ernie5

PD_BUILD_OP(ernie5_swiglu)
    .Inputs({"Hidden"})
    .Outputs({"Out"})
    .SetKernelFn(PD_KERNEL(ernie5::swiglu_binding::forward))
    .SetInferShapeFn(PD_INFER_SHAPE(ernie5::swiglu_binding::forward_shapes))
    .SetInferDtypeFn(PD_INFER_DTYPE(ernie5::swiglu_binding::forward_types));

PD_BUILD_GRAD_OP(ernie5_swiglu)
    .Inputs({"Hidden", paddle::Grad("Out")})
    .Outputs({paddle::Grad("Hidden")})
    .SetKernelFn(PD_KERNEL(ernie5::swiglu_binding::backward));
