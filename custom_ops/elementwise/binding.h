// Paddle operators of sums and conversions, on the CPU.
//   add   x, y of one shape and type -> out = x + y. Gradients of both.
//   fork  x -> a, b, c, the same memory three times, for up to three readers. The gradient of x is the sum of theirs.
//   cast  x -> out of the other type of float32 and bfloat16. Gradient of x.
#pragma once

#include <cstring>
#include <vector>

#include "common/binding.h"
#include "elementwise/elementwise.h"

namespace ernie5 {
namespace elementwise_binding {

using binding::data;
using paddle::DataType;
using paddle::Tensor;
using Shape = std::vector<int64_t>;

inline Tensor sum_of(const std::vector<const Tensor*>& tensors) {
  const Tensor& first = *tensors[0];
  PD_CHECK(first.dtype() == DataType::FLOAT32 || first.dtype() == DataType::BFLOAT16, "sum: float32 or bfloat16");
  for (const Tensor* tensor : tensors) {
    PD_CHECK(tensor->is_cpu() && tensor->dtype() == first.dtype() && tensor->shape() == first.shape(),
             "sum: tensors on the CPU, of one shape and type");
  }
  Tensor out = paddle::empty(first.shape(), first.dtype(), first.place());
  auto run = [&](auto zero, auto launcher) {
    using T = decltype(zero);
    std::vector<const T*> values;
    for (const Tensor* tensor : tensors) values.push_back(data<T>(*tensor));
    launcher(values.data(), static_cast<int64_t>(values.size()), first.numel(), data<T>(out));
  };
  binding::by_type<bf16>(first, run, ernie5_sum_forward_cpu_f32, ernie5_sum_forward_cpu_bf16);
  return out;
}

// Views: were they x itself, Paddle would take it for changed in place.
inline std::vector<Tensor> fork(const Tensor& x) {
  PD_CHECK(x.is_cpu(), "fork: the tensor lies on the CPU");
  return {paddle::reshape(x, x.shape()), paddle::reshape(x, x.shape()), paddle::reshape(x, x.shape())};
}
// The gradient of an output that nothing used arrives uninitialised.
inline std::vector<Tensor> fork_grad(const paddle::optional<Tensor>& a, const paddle::optional<Tensor>& b,
                                     const paddle::optional<Tensor>& c) {
  std::vector<const Tensor*> present;
  for (const auto* grad : {&a, &b, &c}) {
    if (*grad && (*grad)->initialized()) present.push_back(&**grad);
  }
  PD_CHECK(!present.empty(), "fork: no output has a gradient");
  return {sum_of(present)};
}
inline std::vector<Shape> fork_shapes(const Shape& x) { return {x, x, x}; }
inline std::vector<DataType> fork_types(const DataType& x) { return {x, x, x}; }

inline std::vector<Tensor> add(const Tensor& x, const Tensor& y, bool /*alone*/) { return {sum_of({&x, &y})}; }
// Two copies, since Paddle may accumulate into either in place; but not where nothing else reads x and y (`alone`).
inline std::vector<Tensor> add_grad(const Tensor& grad, bool alone) {
  if (alone) return {grad, grad};
  return {sum_of({&grad}), sum_of({&grad})};
}
inline std::vector<Shape> add_shapes(const Shape& x, const Shape& /*y*/, bool) { return {x}; }
inline std::vector<DataType> add_types(const DataType& x, const DataType& /*y*/, bool) { return {x}; }

inline DataType other(DataType type) { return type == DataType::FLOAT32 ? DataType::BFLOAT16 : DataType::FLOAT32; }

inline std::vector<Tensor> cast(const Tensor& x) {
  PD_CHECK(x.is_cpu() && (x.dtype() == DataType::FLOAT32 || x.dtype() == DataType::BFLOAT16),
           "cast: float32 or bfloat16, on the CPU");
  Tensor out = paddle::empty(x.shape(), other(x.dtype()), x.place());
  if (x.dtype() == DataType::FLOAT32) ernie5_narrow_forward_cpu(data<float>(x), x.numel(), data<bf16>(out));
  else ernie5_widen_forward_cpu(data<bf16>(x), x.numel(), data<float>(out));
  return {out};
}
inline std::vector<Shape> cast_shapes(const Shape& x) { return {x}; }
inline std::vector<DataType> cast_types(const DataType& x) { return {other(x)}; }

}  // namespace elementwise_binding
}  // namespace ernie5

PD_BUILD_OP(ernie5_fork)
    .Inputs({"x"})
    .Outputs({"a", "b", "c"})
    .SetKernelFn(PD_KERNEL(ernie5::elementwise_binding::fork))
    .SetInferShapeFn(PD_INFER_SHAPE(ernie5::elementwise_binding::fork_shapes))
    .SetInferDtypeFn(PD_INFER_DTYPE(ernie5::elementwise_binding::fork_types));

PD_BUILD_GRAD_OP(ernie5_fork)
    .Inputs({paddle::Optional(paddle::Grad("a")), paddle::Optional(paddle::Grad("b")),
             paddle::Optional(paddle::Grad("c"))})
    .Outputs({paddle::Grad("x")})
    .SetKernelFn(PD_KERNEL(ernie5::elementwise_binding::fork_grad));

PD_BUILD_OP(ernie5_add)
    .Inputs({"x", "y"})
    .Outputs({"out"})
    .Attrs({"alone: bool"})
    .SetKernelFn(PD_KERNEL(ernie5::elementwise_binding::add))
    .SetInferShapeFn(PD_INFER_SHAPE(ernie5::elementwise_binding::add_shapes))
    .SetInferDtypeFn(PD_INFER_DTYPE(ernie5::elementwise_binding::add_types));

PD_BUILD_GRAD_OP(ernie5_add)
    .Inputs({paddle::Grad("out")})
    .Outputs({paddle::Grad("x"), paddle::Grad("y")})
    .Attrs({"alone: bool"})
    .SetKernelFn(PD_KERNEL(ernie5::elementwise_binding::add_grad));

PD_BUILD_OP(ernie5_cast)
    .Inputs({"x"})
    .Outputs({"out"})
    .SetKernelFn(PD_KERNEL(ernie5::elementwise_binding::cast))
    .SetInferShapeFn(PD_INFER_SHAPE(ernie5::elementwise_binding::cast_shapes))
    .SetInferDtypeFn(PD_INFER_DTYPE(ernie5::elementwise_binding::cast_types));

PD_BUILD_GRAD_OP(ernie5_cast)
    .Inputs({paddle::Grad("out")})
    .Outputs({paddle::Grad("x")})
    .SetKernelFn(PD_KERNEL(ernie5::elementwise_binding::cast));
