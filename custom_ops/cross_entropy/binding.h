// Paddle operator of the cross entropy.
#pragma once

#include "common/binding.h"
#include "cross_entropy/cross_entropy.h"
#ifdef PADDLE_WITH_CUDA
#include "cross_entropy/cross_entropy_cuda.h"
#endif

namespace ernie5 {
namespace cross_entropy_binding {

using binding::data;
using paddle::DataType;
using paddle::Tensor;
using Shape = std::vector<int64_t>;

inline void check(const Tensor& logits, const Tensor& labels) {
  PD_CHECK(logits.dtype() == DataType::FLOAT32 || logits.dtype() == DataType::BFLOAT16,
           "cross_entropy: logits must be float32 or bfloat16");
  binding::check_place("cross_entropy", logits, {&labels});
  PD_CHECK(logits.shape().size() == 2 && labels.dtype() == DataType::INT64 && labels.numel() == logits.shape()[0],
           "cross_entropy: logits must be [N, V], labels int64 [N]");
}

inline void check_labels(const Tensor& labels, int64_t classes) {
  const int64_t* label = data<int64_t>(labels);
  for (int64_t r = 0; r < labels.numel(); ++r) {
    PD_CHECK(label[r] == -100 || (label[r] >= 0 && label[r] < classes), "cross_entropy: label ", label[r], " of row ",
             r, " is neither -100 nor in [0, ", classes, ")");
  }
}

// logits [N, V], labels int64 [N] -> loss, lse float32 [N]. On the GPU a label outside [0, V) gives NaN: to read the
// labels here would be to wait for them. `consume`: the backward pass puts the gradient where the logits are, which
// nobody may use after it.
inline std::vector<Tensor> forward(const Tensor& logits, const Tensor& labels, bool /*consume*/) {
  check(logits, labels);
  const int64_t rows = logits.shape()[0], classes = logits.shape()[1];
  Tensor loss = paddle::empty({rows}, DataType::FLOAT32, logits.place());
  Tensor lse = paddle::empty({rows}, DataType::FLOAT32, logits.place());
  auto run = [&](auto zero, auto launcher, auto... more) {
    using T = decltype(zero);
    return launcher(data<T>(logits), data<int64_t>(labels), rows, classes, data<float>(loss), data<float>(lse),
                    more...);
  };
#ifdef PADDLE_WITH_CUDA
  if (logits.is_gpu()) {
    binding::launch("cross_entropy", logits, run, ernie5_cross_entropy_forward_cuda_f32,
                    ernie5_cross_entropy_forward_cuda_bf16);
    return {loss, lse};
  }
#endif
  check_labels(labels, classes);
  binding::by_type(logits, run, ernie5_cross_entropy_forward_cpu_f32, ernie5_cross_entropy_forward_cpu_bf16);
  return {loss, lse};
}

inline std::vector<Tensor> backward(const Tensor& logits, const Tensor& labels, const Tensor& lse,
                                    const Tensor& grad_loss, bool consume) {
  PD_CHECK(grad_loss.initialized(), "cross_entropy: lse has no gradient, only the loss has");
  const int64_t rows = logits.shape()[0], classes = logits.shape()[1];
  Tensor grad = consume ? logits : paddle::empty_like(logits);
  auto run = [&](auto zero, auto launcher, auto... more) {
    using T = decltype(zero);
    return launcher(data<T>(logits), data<int64_t>(labels), data<float>(lse), data<float>(grad_loss), rows, classes,
                    data<T>(grad), more...);
  };
#ifdef PADDLE_WITH_CUDA
  if (logits.is_gpu()) {
    binding::launch("cross_entropy", logits, run, ernie5_cross_entropy_backward_cuda_f32,
                    ernie5_cross_entropy_backward_cuda_bf16);
    return {grad};
  }
#endif
  binding::by_type(logits, run, ernie5_cross_entropy_backward_cpu_f32, ernie5_cross_entropy_backward_cpu_bf16);
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
