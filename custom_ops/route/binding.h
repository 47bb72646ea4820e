// Paddle operators of expert selection and of the permutation.
#pragma once

#include "common/binding.h"
#include "route/route.h"
#ifdef PADDLE_WITH_CUDA
#include "route/route_cuda.h"
#endif

namespace ernie5 {
namespace route_binding {

using binding::data;
using paddle::DataType;
using paddle::Tensor;
using Shape = std::vector<int64_t>;

struct Permutation {
  Tensor counts, order, offsets;
};

inline Permutation empty_permutation(int64_t assignments, int64_t num_experts, const phi::Place& place) {
  return {paddle::empty({num_experts}, DataType::INT64, place), paddle::empty({assignments}, DataType::INT32, place),
          paddle::empty({num_experts + 1}, DataType::INT32, place)};
}

// logits float32 [T, E], bias float32 [E], valid bool or uint8 [T] -> experts int32 [T, K], weights float32 [T, K],
// counts int64 [E], order int32 [T * K], offsets int32 [E + 1].
inline std::vector<Tensor> forward(const Tensor& logits, const Tensor& bias, const Tensor& valid, int64_t top_k,
                                   bool softmax, float scale) {
  binding::check_place("route", logits, {&bias, &valid});
  PD_CHECK(logits.dtype() == DataType::FLOAT32 && bias.dtype() == DataType::FLOAT32,
           "route: logits and bias must be float32");
  PD_CHECK(valid.dtype() == DataType::BOOL || valid.dtype() == DataType::UINT8, "route: valid must be bool or uint8");
  PD_CHECK(logits.shape().size() == 2, "route: logits must be [T, E]");
  const int64_t tokens = logits.shape()[0], num_experts = logits.shape()[1];
  PD_CHECK(bias.numel() == num_experts && valid.numel() == tokens, "route: bias must be [E], valid [T]");
  PD_CHECK(top_k >= 1 && top_k <= num_experts, "route: top_k is ", top_k, ", expected 1 .. ", num_experts);
  PD_CHECK(tokens * top_k < INT32_MAX, "route: T * K must be below 2^31");
  const phi::Place place = logits.place();
  Tensor experts = paddle::empty({tokens, top_k}, DataType::INT32, place);
  Tensor weights = paddle::empty({tokens, top_k}, DataType::FLOAT32, place);
  Permutation to = empty_permutation(tokens * top_k, num_experts, place);
  auto run = [&](auto launcher, auto... more) {
    return launcher(data<float>(logits), data<float>(bias), static_cast<const uint8_t*>(valid.data()), tokens,
                    num_experts, top_k, softmax, scale, data<int32_t>(experts), data<float>(weights),
                    data<int64_t>(to.counts), data<int32_t>(to.order), data<int32_t>(to.offsets), more...);
  };
#ifdef PADDLE_WITH_CUDA
  if (logits.is_gpu()) {
    Tensor space = binding::workspace(ernie5_permute_cuda_workspace_bytes(tokens, num_experts, top_k), logits);
    binding::check_code("route", run(ernie5_route_forward_cuda_f32, space.data(), logits.stream()));
    return {experts, weights, to.counts, to.order, to.offsets};
  }
#endif
  run(ernie5_route_forward_cpu_f32);
  return {experts, weights, to.counts, to.order, to.offsets};
}

inline std::vector<Tensor> backward(const Tensor& logits, const Tensor& experts, const Tensor& grad_weights,
                                    int64_t top_k, bool softmax, float scale) {
  PD_CHECK(grad_weights.initialized(), "route: only the weights have a gradient");
  Tensor grad = paddle::empty_like(logits);
  auto run = [&](auto launcher, auto... more) {
    return launcher(data<float>(logits), data<int32_t>(experts), data<float>(grad_weights), logits.shape()[0],
                    logits.shape()[1], top_k, softmax, scale, data<float>(grad), more...);
  };
#ifdef PADDLE_WITH_CUDA
  if (logits.is_gpu()) {
    binding::check_code("route", run(ernie5_route_backward_cuda_f32, logits.stream()));
    return {grad};
  }
#endif
  run(ernie5_route_backward_cpu_f32);
  return {grad};
}

// experts int32 [T, K] -> counts, order, offsets.
inline std::vector<Tensor> permute(const Tensor& experts, int64_t num_experts) {
  binding::check_place("permute", experts, {});
  PD_CHECK(experts.dtype() == DataType::INT32 && experts.shape().size() == 2, "permute: experts must be int32 [T, K]");
  PD_CHECK(num_experts >= 1 && experts.numel() < INT32_MAX, "permute: too many assignments, or no experts");
  const int64_t tokens = experts.shape()[0], top_k = experts.shape()[1];
  Permutation to = empty_permutation(experts.numel(), num_experts, experts.place());
  auto run = [&](auto launcher, auto... more) {
    return launcher(data<int32_t>(experts), tokens, num_experts, top_k, data<int64_t>(to.counts),
                    data<int32_t>(to.order), data<int32_t>(to.offsets), more...);
  };
#ifdef PADDLE_WITH_CUDA
  if (experts.is_gpu()) {
    Tensor space = binding::workspace(ernie5_permute_cuda_workspace_bytes(tokens, num_experts, top_k), experts);
    binding::check_code("permute", run(ernie5_permute_forward_cuda, space.data(), experts.stream()));
    return {to.counts, to.order, to.offsets};
  }
#endif
  run(ernie5_permute_forward_cpu);
  return {to.counts, to.order, to.offsets};
}

inline int64_t times(int64_t a, int64_t b) { return a < 0 || b < 0 ? -1 : a * b; }

inline std::vector<Shape> shapes(const Shape& logits, const Shape&, const Shape&, int64_t top_k, bool, float) {
  const int64_t tokens = logits[0], num_experts = logits[1];
  return {{tokens, top_k}, {tokens, top_k}, {num_experts}, {times(tokens, top_k)}, {num_experts + 1}};
}
inline std::vector<DataType> dtypes(const DataType&, const DataType&, const DataType&) {
  return {DataType::INT32, DataType::FLOAT32, DataType::INT64, DataType::INT32, DataType::INT32};
}
inline std::vector<Shape> permute_shapes(const Shape& experts, int64_t num_experts) {
  return {{num_experts}, {times(experts[0], experts[1])}, {num_experts + 1}};
}
inline std::vector<DataType> permute_dtypes(const DataType&) {
  return {DataType::INT64, DataType::INT32, DataType::INT32};
}

}  // namespace route_binding
}  // namespace ernie5

PD_BUILD_OP(ernie5_route)
    .Inputs({"logits", "bias", "valid"})
    .Outputs({"experts", "weights", "counts", "order", "offsets"})
    .Attrs({"top_k: int64_t", "softmax: bool", "scale: float"})
    .SetKernelFn(PD_KERNEL(ernie5::route_binding::forward))
    .SetInferShapeFn(PD_INFER_SHAPE(ernie5::route_binding::shapes))
    .SetInferDtypeFn(PD_INFER_DTYPE(ernie5::route_binding::dtypes));

PD_BUILD_GRAD_OP(ernie5_route)
    .Inputs({"logits", "experts", paddle::Grad("weights")})
    .Outputs({paddle::Grad("logits")})
    .Attrs({"top_k: int64_t", "softmax: bool", "scale: float"})
    .SetKernelFn(PD_KERNEL(ernie5::route_binding::backward));

PD_BUILD_OP(ernie5_permute)
    .Inputs({"experts"})
    .Outputs({"counts", "order", "offsets"})
    .Attrs({"num_experts: int64_t"})
    .SetKernelFn(PD_KERNEL(ernie5::route_binding::permute))
    .SetInferShapeFn(PD_INFER_SHAPE(ernie5::route_binding::permute_shapes))
    .SetInferDtypeFn(PD_INFER_DTYPE(ernie5::route_binding::permute_dtypes));
