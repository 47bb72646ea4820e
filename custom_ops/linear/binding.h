// Paddle operator ernie5_linear: x [R,D], w [D,O] ([O,D] when `transposed`) -> y [R,O]; float32 or bfloat16.
// Gradients of x and w.
#pragma once

#include <vector>

#include "linear/linear.h"
#include "paddle/extension.h"

namespace ernie5 {
namespace linear_binding {

using paddle::DataType;
using paddle::Tensor;
using Shape = std::vector<int64_t>;

struct Sizes {
  int64_t rows, dim, out;
};

inline Sizes sizes_of(const Tensor& x, const Tensor& w, bool transposed) {
  PD_CHECK(x.is_cpu() && w.is_cpu(), "linear takes tensors on the CPU");
  PD_CHECK(x.dtype() == DataType::FLOAT32 || x.dtype() == DataType::BFLOAT16, "linear takes float32 or bfloat16");
  PD_CHECK(w.dtype() == x.dtype(), "linear: x and w share a type");
  const Shape xs = x.shape(), ws = w.shape();
  PD_CHECK(xs.size() == 2 && ws.size() == 2 && ws[transposed ? 1 : 0] == xs[1], "linear: x is [R,D], w ",
           transposed ? "[O,D]" : "[D,O]");
  return {xs[0], xs[1], ws[transposed ? 0 : 1]};
}

inline std::vector<Tensor> forward(const Tensor& x, const Tensor& w, bool transposed) {
  const Sizes s = sizes_of(x, w, transposed);
  Tensor y = paddle::empty({s.rows, s.out}, x.dtype(), x.place());
  if (x.dtype() == DataType::FLOAT32) {
    ernie5_linear_forward_cpu_f32(x.data<float>(), w.data<float>(), s.rows, s.dim, s.out, transposed, y.data<float>());
  } else {
    ernie5_linear_forward_cpu_bf16(reinterpret_cast<const bf16*>(x.data()), reinterpret_cast<const bf16*>(w.data()),
                                   s.rows, s.dim, s.out, transposed, reinterpret_cast<bf16*>(y.data()));
  }
  return {y};
}

inline std::vector<Tensor> backward(const Tensor& x, const Tensor& w, const Tensor& grad_y, bool transposed) {
  const Sizes s = sizes_of(x, w, transposed);
  PD_CHECK(grad_y.dtype() == x.dtype() && (grad_y.shape() == Shape{s.rows, s.out}),
           "linear: the gradient of y is [R,O], of the type of x");
  Tensor grad_x = paddle::empty(x.shape(), x.dtype(), x.place());
  Tensor grad_w = paddle::empty(w.shape(), x.dtype(), x.place());
  if (x.dtype() == DataType::FLOAT32) {
    ernie5_linear_backward_cpu_f32(x.data<float>(), w.data<float>(), grad_y.data<float>(), s.rows, s.dim, s.out,
                                   transposed, grad_x.data<float>(), grad_w.data<float>());
  } else {
    ernie5_linear_backward_cpu_bf16(
        reinterpret_cast<const bf16*>(x.data()), reinterpret_cast<const bf16*>(w.data()),
        reinterpret_cast<const bf16*>(grad_y.data()), s.rows, s.dim, s.out, transposed,
        reinterpret_cast<bf16*>(grad_x.data()), reinterpret_cast<bf16*>(grad_w.data()));
  }
  return {grad_x, grad_w};
}

inline std::vector<Shape> infer_shape(const Shape& x, const Shape& w, const bool& transposed) {
  return {{x[0], w[transposed ? 0 : 1]}};
}
inline std::vector<DataType> infer_dtype(const DataType& x, const DataType& /*w*/) { return {x}; }

}  // namespace linear_binding
}  // namespace ernie5

PD_BUILD_OP(ernie5_linear)
    .Inputs({"x", "w"})
    .Outputs({"y"})
    .Attrs({"transposed: bool"})
    .SetKernelFn(PD_KERNEL(ernie5::linear_binding::forward))
    .SetInferShapeFn(PD_INFER_SHAPE(ernie5::linear_binding::infer_shape))
    .SetInferDtypeFn(PD_INFER_DTYPE(ernie5::linear_binding::infer_dtype));

PD_BUILD_GRAD_OP(ernie5_linear)
    .Inputs({"x", "w", paddle::Grad("y")})
    .Outputs({paddle::Grad("x"), paddle::Grad("w")})
    .Attrs({"transposed: bool"})
    .SetKernelFn(PD_KERNEL(ernie5::linear_binding::backward));
