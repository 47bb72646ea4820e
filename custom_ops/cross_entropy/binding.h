// Paddle operator of the cross entropy.
#pragma once

#include "cross_entropy/cross_entropy.h"
#include "paddle/extension.h"

namespace ernie5 {
namespace cross_entropy_binding {

using paddle::DataType;
using paddle::Tensor;
using Shape = std::vector<int64_t>;

inline void check(const Tensor& logits, const Tensor& labels) {
  PD_CHECK(logits.dtype() == DataType::FLOAT32 || logits.dtype() == DataType::BFLOAT16,
           "cross_entropy: logits must be float32 or bfloat16");
  PD_CHECK(logits.is_cpu() && labels.is_cpu(), "cross_entropy: the tensors must lie on the CPU");
  PD_CHECK(logits.shape().size() == 2 && labels.dtype() == DataType::INT64 && labels.numel() == logits.shape()[0],
           "cross_entropy: logits must be [N, V], labels int64 [N]");
}

inline uint16_t* bits(Tensor& t) { return reinterpret_cast<uint16_t*>(t.data<phi::dtype::bfloat16>()); }
inline const uint16_t* bits(const Tensor& t) {
  return reinterpret_cast<const uint16_t*>(t.data<phi::dtype::bfloat16>());
}

// logits [N, V], labels int64 [N] -> loss, lse float32 [N]. `consume`: the backward pass puts the gradient where the
// logits are, which nobody may use after it.
inline std::vector<Tensor> forward(const Tensor& logits, const Tensor& labels, bool /*consume*/) {
  check(logits, labels);
  const int64_t rows = logits.shape()[0], classes = logits.shape()[1];
  const int64_t* label = labels.data<int64_t>();
  for (int64_t r = 0; r < rows; ++r) {
    PD_CHECK(label[r] == -100 || (label[r] >= 0 && label[r] < classes), "cross_entropy: label ", label[r], " of row ",
             r, " is neither -100 nor in [0, ", classes, ")");
  }
  Tensor loss = paddle::empty({rows}, DataType::FLOAT32, logits.place());
  Tensor lse = paddle::empty({rows}, DataType::FLOAT32, logits.place());
  if (logits.dtype() == DataType::FLOAT32) {
    ernie5_cross_entropy_forward_cpu_f32(logits.data<float>(), label, rows, classes, loss.data<float>(),
                                         lse.data<float>());
  } else {
    ernie5_cross_entropy_forward_cpu_bf16(bits(logits), label, rows, classes, loss.data<float>(), lse.data<float>());
  }
  return {loss, lse};
}

inline std::vector<Tensor> backward(const Tensor& logits, const Tensor& labels, const Tensor& lse,
                                    const Tensor& grad_loss, bool consume) {
  PD_CHECK(grad_loss.initialized(), "cross_entropy: lse has no gradient, only the loss has");
  const int64_t rows = logits.shape()[0], classes = logits.shape()[1];
  Tensor grad = consume ? logits : paddle::empty_like(logits);
  if (logits.dtype() == DataType::FLOAT32) {
    ernie5_cross_entropy_backward_cpu_f32(logits.data<float>(), labels.data<int64_t>(), lse.data<float>(),
                                          grad_loss.data<float>(), rows, classes, grad.data<float>());
  } else {
    ernie5_cross_entropy_backward_cpu_bf16(bits(logits), labels.data<int64_t>(), lse.data<float>(),
                                           grad_loss.data<float>(), rows, classes, bits(grad));
  }
  return {grad};
}

inline std::vector<Shape> shapes(const Shape& logits, const Shape&, bool) { return {{logits[0]}, {logits[0]}}; }
inline std::vector<DataType> dtypes(const DataType&, const DataType&, bool) {
  return {DataType::FLOAT32, DataType::FLOAT32};
}

}  // namespace cross_entropy_binding
}  // namespace ernie5

PD_BUILD_OP(ernie5_cross_entropy)
    .Inputs({"logits", "labels"})
    .Outputs({"loss", "lse"})
    .Attrs({"consume: bool"})
    .SetKernelFn(PD_KERNEL(ernie5::cross_entropy_binding::forward))
    .SetInferShapeFn(PD_INFER_SHAPE(ernie5::cross_entropy_binding::shapes))
    .SetInferDtypeFn(PD_INFER_DTYPE(ernie5::cross_entropy_binding::dtypes));

PD_BUILD_GRAD_OP(ernie5_cross_entropy)
    .Inputs({"logits", "labels", "lse", paddle::Grad("loss")})
    .Outputs({paddle::Grad("logits")})
    .Attrs({"consume: bool"})
    .SetKernelFn(PD_KERNEL(ernie5::cross_entropy_binding::backward));
