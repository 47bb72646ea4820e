// Paddle operators of RMSNorm.
#pragma once

#include "common/binding.h"
#include "rms_norm/rms_norm.h"
#ifdef PADDLE_WITH_CUDA
#include "rms_norm/rms_norm_cuda.h"
#endif

namespace ernie5 {
namespace rms_norm_binding {

using binding::data;
using paddle::DataType;
using paddle::Tensor;
using Shape = std::vector<int64_t>;

struct Sizes {
  int64_t rows, columns;
};

inline Sizes sizes_of(const Tensor& x, const Tensor& weight) {
  PD_CHECK(x.dtype() == weight.dtype(), "rms_norm: x and weight must have one dtype");
  PD_CHECK(x.dtype() == DataType::FLOAT32 || x.dtype() == DataType::BFLOAT16, "rms_norm: float32 or bfloat16");
  binding::check_place("rms_norm", x, {&weight});
  const Shape shape = x.shape();
  PD_CHECK(!shape.empty() && weight.numel() == shape.back(), "rms_norm: weight must be [D], x [..., D]");
  return {shape.back() > 0 ? x.numel() / shape.back() : 0, shape.back()};
}

struct Forward {
  Tensor y, sum, inverse;
};

inline Forward forward(const Tensor& x, const Tensor* residual, const Tensor& weight, float eps) {
  const Sizes sizes = sizes_of(x, weight);
  PD_CHECK(residual == nullptr || (residual->shape() == x.shape() && residual->dtype() == x.dtype()),
           "rms_norm: residual must have the shape and dtype of x");
  Shape outer = x.shape();
  outer.pop_back();
  Forward out{paddle::empty_like(x), residual != nullptr ? paddle::empty_like(x) : Tensor(),
              paddle::empty(outer, DataType::FLOAT32, x.place())};
  auto run = [&](auto zero, auto launcher, auto... more) {
    using T = decltype(zero);
    return launcher(data<T>(x), data<T>(residual), data<T>(weight), sizes.rows, sizes.columns, eps, data<T>(out.y),
                    data<T>(residual != nullptr ? &out.sum : nullptr), data<float>(out.inverse), more...);
  };
#ifdef PADDLE_WITH_CUDA
  if (x.is_gpu()) {
    binding::launch("rms_norm", x, run, ernie5_rms_norm_forward_cuda_f32, ernie5_rms_norm_forward_cuda_bf16);
    return out;
  }
#endif
  binding::by_type(x, run, ernie5_rms_norm_forward_cpu_f32, ernie5_rms_norm_forward_cpu_bf16);
  return out;
}

// Gradients of s and weight; and a copy of the former in `second`, if given.
inline std::vector<Tensor> backward(const Tensor& s, const Tensor& weight, const Tensor& inverse, const Tensor& grad_y,
                                    const Tensor* grad_sum, Tensor* second) {
  const Sizes sizes = sizes_of(s, weight);
  Tensor grad = paddle::empty_like(s), grad_weight = paddle::empty_like(weight);
  auto run = [&](auto zero, auto launcher, auto... more) {
    using T = decltype(zero);
    return launcher(data<T>(s), data<T>(weight), data<float>(inverse), data<T>(grad_y), data<T>(grad_sum), sizes.rows,
                    sizes.columns, data<T>(grad), data<T>(second), data<T>(grad_weight), more...);
  };
#ifdef PADDLE_WITH_CUDA
  if (s.is_gpu()) {
    Tensor space = binding::workspace(ernie5_rms_norm_backward_cuda_workspace_bytes(sizes.rows, sizes.columns), s);
    binding::launch("rms_norm", s, run, ernie5_rms_norm_backward_cuda_f32, ernie5_rms_norm_backward_cuda_bf16,
                    space.data());
    return {grad, grad_weight};
  }
#endif
  Tensor partial = paddle::empty({ernie5_rms_norm_partial_size(sizes.rows, sizes.columns)}, DataType::FLOAT32,
                                 s.place());
  binding::by_type(s, run, ernie5_rms_norm_backward_cpu_f32, ernie5_rms_norm_backward_cpu_bf16, data<float>(partial));
  return {grad, grad_weight};
}

// x [..., D], weight [D] -> y [..., D], inverse float32 [...].
inline std::vector<Tensor> norm(const Tensor& x, const Tensor& weight, float eps) {
  Forward out = forward(x, nullptr, weight, eps);
  return {out.y, out.inverse};
}
inline std::vector<Tensor> norm_grad(const Tensor& x, const Tensor& weight, const Tensor& inverse,
                                     const Tensor& grad_y) {
  return backward(x, weight, inverse, grad_y, nullptr, nullptr);
}

// x, residual [..., D], weight [D] -> y of x + residual, sum = x + residual, inverse.
inline std::vector<Tensor> add_norm(const Tensor& x, const Tensor& residual, const Tensor& weight, float eps) {
  Forward out = forward(x, &residual, weight, eps);
  return {out.y, out.sum, out.inverse};
}
// The gradient of an output that nothing used arrives uninitialised. Two copies of the result: Paddle may accumulate
// into either in place.
inline std::vector<Tensor> add_norm_grad(const Tensor& weight, const Tensor& sum, const Tensor& inverse,
                                         const paddle::optional<Tensor>& grad_y,
                                         const paddle::optional<Tensor>& grad_sum) {
  Tensor second = paddle::empty_like(sum);
  const bool of_y = grad_y && grad_y->initialized(), of_sum = grad_sum && grad_sum->initialized();
  const Tensor grad = of_y ? *grad_y : paddle::full(sum.shape(), 0, sum.dtype(), sum.place());
  auto grads = backward(sum, weight, inverse, grad, of_sum ? &*grad_sum : nullptr, &second);
  return {grads[0], second, grads[1]};
}

inline Shape outer_shape(Shape x) {
  x.pop_back();
  return x;
}
inline std::vector<Shape> norm_shapes(const Shape& x, const Shape&, float) { return {x, outer_shape(x)}; }
inline std::vector<DataType> norm_dtypes(const DataType& x, const DataType&) { return {x, DataType::FLOAT32}; }
inline std::vector<Shape> add_norm_shapes(const Shape& x, const Shape&, const Shape&, float) {
  return {x, x, outer_shape(x)};
}
inline std::vector<DataType> add_norm_dtypes(const DataType& x, const DataType&, const DataType&) {
  return {x, x, DataType::FLOAT32};
}

}  // namespace rms_norm_binding
}  // namespace ernie5

PD_BUILD_OP(ernie5_rms_norm)
    .Inputs({"x", "weight"})
    .Outputs({"y", "inverse"})
    .Attrs({"eps: float"})
    .SetKernelFn(PD_KERNEL(ernie5::rms_norm_binding::norm))
    .SetInferShapeFn(PD_INFER_SHAPE(ernie5::rms_norm_binding::norm_shapes))
    .SetInferDtypeFn(PD_INFER_DTYPE(ernie5::rms_norm_binding::norm_dtypes));

PD_BUILD_GRAD_OP(ernie5_rms_norm)
    .Inputs({"x", "weight", "inverse", paddle::Grad("y")})
    .Outputs({paddle::Grad("x"), paddle::Grad("weight")})
    .SetKernelFn(PD_KERNEL(ernie5::rms_norm_binding::norm_grad));

PD_BUILD_OP(ernie5_add_rms_norm)
    .Inputs({"x", "residual", "weight"})
    .Outputs({"y", "sum", "inverse"})
    .Attrs({"eps: float"})
    .SetKernelFn(PD_KERNEL(ernie5::rms_norm_binding::add_norm))
    .SetInferShapeFn(PD_INFER_SHAPE(ernie5::rms_norm_binding::add_norm_shapes))
    .SetInferDtypeFn(PD_INFER_DTYPE(ernie5::rms_norm_binding::add_norm_dtypes));

PD_BUILD_GRAD_OP(ernie5_add_rms_norm)
    .Inputs({"weight", "sum", "inverse", paddle::Optional(paddle::Grad("y")),
             paddle::Optional(paddle::Grad("sum"))})
    .Outputs({paddle::Grad("x"), paddle::Grad("residual"), paddle::Grad("weight")})
    .SetKernelFn(PD_KERNEL(ernie5::rms_norm_binding::add_norm_grad));
