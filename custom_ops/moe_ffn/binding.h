// Paddle operators ernie5_moe_ffn, its backward in two steps, and ernie5_dense_ffn; shapes in moe_ffn.h.
//   moe_ffn    inputs x [T,D]; weights float32 [T,K]; order int32 [T*K]; offsets int32 [E+1]; gate_up [E,D,2F];
//              down [E,F,D]. outputs y [T,D]; hidden [T*K,2F], for the backward. gradients of x, weights, gate_up,
//              down.
//   moe_ffn_backward_rows     inputs of moe_ffn, hidden, grad_y [T,D]. outputs grad_x, grad_weights; work, for
//   moe_ffn_backward_weights  lists with an entry a part: x, grad_y, work, order, offsets; then gate_up and down, for
//              their shapes. outputs grad_gate_up, grad_down, over all parts. Both on the CPU.
//   dense_ffn  inputs x [R,D]; gate_up [D,2F]; down [F,D]. outputs y [R,D]; hidden [R,2F]. gradients of all inputs.
// x, gate_up and down share a type, float32 or bfloat16.
#pragma once

#include <vector>

#include "common/binding.h"
#include "moe_ffn/moe_ffn.h"
#ifdef PADDLE_WITH_CUDA
#include "moe_ffn/moe_ffn_cuda.h"
#endif

namespace ernie5 {
namespace moe_ffn_binding {

using binding::data;
using paddle::DataType;
using paddle::Tensor;
using Shape = std::vector<int64_t>;

inline void check_kind(const char* op, const Tensor& x, std::initializer_list<const Tensor*> others) {
  binding::check_place(op, x, others);
  PD_CHECK(x.dtype() == DataType::FLOAT32 || x.dtype() == DataType::BFLOAT16, op, " takes float32 or bfloat16");
  for (const Tensor* other : others) {
    PD_CHECK(other->dtype() == x.dtype(), op, ": x, gate_up and down share a type");
  }
}

inline Tensor like(const Tensor& x, const Shape& shape) { return paddle::empty(shape, x.dtype(), x.place()); }

// -------------------------------------------------------------------------------------------------- grouped experts

struct Sizes {
  int64_t tokens, top_k, dim, experts, width;
  int64_t rows() const { return tokens * top_k; }
  int64_t work_width() const { return 3 * width + 64; }
};

// The kernels index memory with these values. (On the GPU the launchers check the offsets, and trust the order.)
inline void check_routing(const Tensor& order, const Tensor& offsets, const Sizes& sizes) {
  const int32_t* bounds = offsets.data<int32_t>();
  PD_CHECK(bounds[0] == 0 && bounds[sizes.experts] <= sizes.rows(), "moe_ffn: offsets run from 0 to at most T*K");
  for (int64_t e = 0; e < sizes.experts; ++e) PD_CHECK(bounds[e] <= bounds[e + 1], "moe_ffn: offsets decrease");
  const int32_t* assignments = order.data<int32_t>();
  for (int64_t r = 0; r < bounds[sizes.experts]; ++r) {
    PD_CHECK(assignments[r] >= 0 && assignments[r] < sizes.rows(), "moe_ffn: order[", r, "] = ", assignments[r]);
  }
}

inline Sizes sizes_of(const Tensor& x, const Tensor& weights, const Tensor& order, const Tensor& offsets,
                      const Tensor& gate_up, const Tensor& down) {
  check_kind("moe_ffn", x, {&gate_up, &down});
  const Shape xs = x.shape(), ws = weights.shape(), gs = gate_up.shape(), ds = down.shape();
  PD_CHECK(xs.size() == 2 && ws.size() == 2 && gs.size() == 3 && ds.size() == 3, "moe_ffn: wrong ranks");
  const Sizes sizes{xs[0], ws[1], xs[1], ds[0], ds[1]};
  PD_CHECK(ws[0] == sizes.tokens && weights.dtype() == DataType::FLOAT32, "moe_ffn: weights are float32 [T,K]");
  PD_CHECK((gs == Shape{sizes.experts, sizes.dim, 2 * sizes.width}) && ds[2] == sizes.dim,
           "moe_ffn: gate_up is [E,D,2F] and down [E,F,D]");
  PD_CHECK(order.dtype() == DataType::INT32 && order.numel() == sizes.rows(), "moe_ffn: order is int32 [T*K]");
  PD_CHECK(offsets.dtype() == DataType::INT32 && offsets.numel() == sizes.experts + 1,
           "moe_ffn: offsets are int32 [E+1]");
  binding::check_place("moe_ffn", x, {&weights, &order, &offsets});
  if (x.is_cpu()) check_routing(order, offsets, sizes);
  return sizes;
}

#ifdef PADDLE_WITH_CUDA
// The offsets in host memory, for the shapes of cuBLAS's products; waits for the stream.
inline std::vector<int32_t> host_offsets(const Tensor& offsets, int64_t experts) {
  std::vector<int32_t> host(static_cast<size_t>(experts) + 1);
  binding::check_code("moe_ffn", ernie5_moe_ffn_host_offsets_cuda(data<int32_t>(offsets), experts, host.data(),
                                                                  offsets.stream()));
  return host;
}
#endif

inline std::vector<Tensor> forward(const Tensor& x, const Tensor& weights, const Tensor& order, const Tensor& offsets,
                                   const Tensor& gate_up, const Tensor& down) {
  const Sizes s = sizes_of(x, weights, order, offsets, gate_up, down);
  Tensor y = like(x, {s.tokens, s.dim}), hidden = like(x, {s.rows(), 2 * s.width}), rows = like(x, {s.rows(), s.dim});
  auto run = [&](auto zero, auto launcher, auto... more) {
    using T = decltype(zero);
    return launcher(data<T>(x), data<float>(weights), data<int32_t>(order), data<int32_t>(offsets), data<T>(gate_up),
                    data<T>(down), s.tokens, s.top_k, s.dim, s.experts, s.width, data<T>(y), data<T>(hidden),
                    data<T>(rows), more...);
  };
#ifdef PADDLE_WITH_CUDA
  if (x.is_gpu()) {
    auto bytes = [&](auto /*zero*/, auto of) { return of(s.tokens, s.top_k, s.dim, s.experts, s.width, 1); };
    Tensor space = binding::workspace(binding::by_type(x, bytes, ernie5_moe_ffn_forward_cuda_workspace_bytes_f32,
                                                       ernie5_moe_ffn_forward_cuda_workspace_bytes_bf16),
                                      x);
    const std::vector<int32_t> host = host_offsets(offsets, s.experts);
    binding::launch("moe_ffn", x, run, ernie5_moe_ffn_forward_cuda_f32, ernie5_moe_ffn_forward_cuda_bf16, host.data(),
                    space.data());
    return {y, hidden};
  }
#endif
  binding::by_type<bf16>(x, run, ernie5_moe_ffn_forward_cpu_f32, ernie5_moe_ffn_forward_cpu_bf16);
  return {y, hidden};
}

inline std::vector<Tensor> backward(const Tensor& x, const Tensor& weights, const Tensor& order, const Tensor& offsets,
                                    const Tensor& gate_up, const Tensor& down, const Tensor& hidden,
                                    const Tensor& grad_y) {
  const Sizes s = sizes_of(x, weights, order, offsets, gate_up, down);
  check_kind("moe_ffn", x, {&hidden, &grad_y});
  PD_CHECK(grad_y.shape() == x.shape(), "moe_ffn: the gradient of y has the shape of x");
  Tensor grad_x = like(x, x.shape()), grad_weights = like(weights, weights.shape());
  Tensor grad_gate_up = like(x, gate_up.shape()), grad_down = like(x, down.shape());
  Tensor rows = like(x, {s.rows(), s.dim}), work = like(x, {s.rows(), s.work_width()});
  auto run = [&](auto zero, auto launcher, auto... more) {
    using T = decltype(zero);
    return launcher(data<T>(x), data<float>(weights), data<int32_t>(order), data<int32_t>(offsets), data<T>(gate_up),
                    data<T>(down), data<T>(hidden), data<T>(grad_y), s.tokens, s.top_k, s.dim, s.experts, s.width,
                    data<T>(grad_x), data<float>(grad_weights), data<T>(grad_gate_up), data<T>(grad_down),
                    data<T>(rows), data<T>(work), more...);
  };
  const std::vector<Tensor> grads{grad_x, grad_weights, grad_gate_up, grad_down};
#ifdef PADDLE_WITH_CUDA
  if (x.is_gpu()) {
    auto bytes = [&](auto /*zero*/, auto of) { return of(s.tokens, s.top_k, s.dim, s.experts, s.width); };
    Tensor space = binding::workspace(binding::by_type(x, bytes, ernie5_moe_ffn_backward_cuda_workspace_bytes_f32,
                                                       ernie5_moe_ffn_backward_cuda_workspace_bytes_bf16),
                                      x);
    const std::vector<int32_t> host = host_offsets(offsets, s.experts);
    binding::launch("moe_ffn", x, run, ernie5_moe_ffn_backward_cuda_f32, ernie5_moe_ffn_backward_cuda_bf16,
                    host.data(), space.data());
    return grads;
  }
#endif
  binding::by_type<bf16>(x, run, ernie5_moe_ffn_backward_cpu_f32, ernie5_moe_ffn_backward_cpu_bf16);
  return grads;
}

// The backward of one part of the tokens, but for the gradients of the experts' weights.
inline std::vector<Tensor> backward_rows(const Tensor& x, const Tensor& weights, const Tensor& order,
                                         const Tensor& offsets, const Tensor& gate_up, const Tensor& down,
                                         const Tensor& hidden, const Tensor& grad_y) {
  const Sizes s = sizes_of(x, weights, order, offsets, gate_up, down);
  check_kind("moe_ffn_backward_rows", x, {&hidden, &grad_y});
  PD_CHECK(x.is_cpu() && grad_y.shape() == x.shape() && (hidden.shape() == Shape{s.rows(), 2 * s.width}),
           "moe_ffn_backward_rows: grad_y is [T,D] and hidden [T*K,2F], on the CPU");
  Tensor grad_x = like(x, x.shape()), grad_weights = like(weights, weights.shape());
  Tensor rows = like(x, {s.rows(), s.dim}), work = like(x, {s.rows(), s.work_width()});
  auto run = [&](auto zero, auto launcher) {
    using T = decltype(zero);
    T* none = nullptr;
    return launcher(data<T>(x), data<float>(weights), data<int32_t>(order), data<int32_t>(offsets), data<T>(gate_up),
                    data<T>(down), data<T>(hidden), data<T>(grad_y), s.tokens, s.top_k, s.dim, s.experts, s.width,
                    data<T>(grad_x), data<float>(grad_weights), none, none, data<T>(rows), data<T>(work));
  };
  binding::by_type<bf16>(x, run, ernie5_moe_ffn_backward_cpu_f32, ernie5_moe_ffn_backward_cpu_bf16);
  return {grad_x, grad_weights, work};
}

inline std::vector<Tensor> backward_weights(const std::vector<Tensor>& x, const std::vector<Tensor>& grad_y,
                                            const std::vector<Tensor>& work, const std::vector<Tensor>& order,
                                            const std::vector<Tensor>& offsets, const Tensor& gate_up,
                                            const Tensor& down) {
  const char* op = "moe_ffn_backward_weights";
  const size_t parts = x.size();
  PD_CHECK(grad_y.size() == parts && work.size() == parts && order.size() == parts && offsets.size() == parts, op,
           ": all lists are as long");
  const Shape ds = down.shape();
  PD_CHECK(gate_up.is_cpu() && ds.size() == 3 && (gate_up.shape() == Shape{ds[0], ds[2], 2 * ds[1]}), op,
           ": gate_up is [E,D,2F] and down [E,F,D], on the CPU");
  check_kind(op, gate_up, {&down});
  std::vector<int64_t> tokens;
  int64_t top_k = 1;
  for (size_t p = 0; p < parts; ++p) {
    check_kind(op, gate_up, {&x[p], &grad_y[p], &work[p]});
    const Shape xs = x[p].shape();
    PD_CHECK(xs.size() == 2 && xs[1] == ds[2] && grad_y[p].shape() == xs, op, ": x and grad_y are [T,D]");
    if (xs[0] > 0) top_k = order[p].numel() / xs[0];
    tokens.push_back(xs[0]);
  }
  for (size_t p = 0; p < parts; ++p) {
    const Sizes s{tokens[p], top_k, ds[2], ds[0], ds[1]};
    PD_CHECK(order[p].dtype() == DataType::INT32 && order[p].numel() == s.rows() &&
                 offsets[p].dtype() == DataType::INT32 && offsets[p].numel() == s.experts + 1 &&
                 (work[p].shape() == Shape{s.rows(), s.work_width()}),
             op, ": order is int32 [T*K], offsets int32 [E+1], work [T*K,3F+64]; K is the same in all parts");
    check_routing(order[p], offsets[p], s);
  }
  Tensor grad_gate_up = like(gate_up, gate_up.shape()), grad_down = like(gate_up, ds);
  auto run = [&](auto zero, auto launcher) {
    using T = decltype(zero);
    auto all = [](auto kind, const std::vector<Tensor>& tensors) {
      std::vector<const decltype(kind)*> pointers;
      for (const Tensor& tensor : tensors) pointers.push_back(data<decltype(kind)>(tensor));
      return pointers;
    };
    const auto xs = all(T{}, x), ys = all(T{}, grad_y), works = all(T{}, work);
    const auto orders = all(int32_t{}, order), bounds = all(int32_t{}, offsets);
    return launcher(xs.data(), ys.data(), works.data(), orders.data(), bounds.data(), tokens.data(),
                    static_cast<int64_t>(parts), top_k, ds[2], ds[0], ds[1], data<T>(grad_gate_up),
                    data<T>(grad_down));
  };
  binding::by_type<bf16>(gate_up, run, ernie5_moe_ffn_backward_weights_cpu_f32,
                         ernie5_moe_ffn_backward_weights_cpu_bf16);
  return {grad_gate_up, grad_down};
}

inline std::vector<Shape> backward_rows_shape(const Shape& x, const Shape& weights, const Shape& /*order*/,
                                              const Shape& /*offsets*/, const Shape& gate_up, const Shape& /*down*/,
                                              const Shape& /*hidden*/, const Shape& /*grad_y*/) {
  const int64_t rows = weights[0] < 0 ? -1 : weights[0] * weights[1];
  return {x, weights, {rows, 3 * gate_up[2] / 2 + 64}};
}
inline std::vector<DataType> backward_rows_dtype(const DataType& x, const DataType& weights, const DataType& /*order*/,
                                                 const DataType& /*offsets*/, const DataType& /*gate_up*/,
                                                 const DataType& /*down*/, const DataType& /*hidden*/,
                                                 const DataType& /*grad_y*/) {
  return {x, weights, x};
}
using Shapes = std::vector<Shape>;
using Types = std::vector<DataType>;
inline Shapes backward_weights_shape(const Shapes& /*x*/, const Shapes& /*grad_y*/, const Shapes& /*work*/,
                                     const Shapes& /*order*/, const Shapes& /*offsets*/, const Shape& gate_up,
                                     const Shape& down) {
  return {gate_up, down};
}
inline Types backward_weights_dtype(const Types& /*x*/, const Types& /*grad_y*/, const Types& /*work*/,
                                    const Types& /*order*/, const Types& /*offsets*/, const DataType& gate_up,
                                    const DataType& down) {
  return {gate_up, down};
}

inline std::vector<Shape> infer_shape(const Shape& x, const Shape& weights, const Shape& /*order*/,
                                      const Shape& /*offsets*/, const Shape& gate_up, const Shape& /*down*/) {
  const int64_t rows = weights[0] < 0 ? -1 : weights[0] * weights[1];
  return {x, {rows, gate_up[2]}};
}
inline std::vector<DataType> infer_dtype(const DataType& x, const DataType& /*weights*/, const DataType& /*order*/,
                                         const DataType& /*offsets*/, const DataType& /*gate_up*/,
                                         const DataType& /*down*/) {
  return {x, x};
}

// ------------------------------------------------------------------------------------------------- one dense expert

inline Sizes dense_sizes_of(const Tensor& x, const Tensor& gate_up, const Tensor& down) {
  check_kind("dense_ffn", x, {&gate_up, &down});
  const Shape xs = x.shape(), ds = down.shape();
  PD_CHECK(xs.size() == 2 && ds.size() == 2 && ds[1] == xs[1] && (gate_up.shape() == Shape{xs[1], 2 * ds[0]}),
           "dense_ffn: x is [R,D], gate_up [D,2F] and down [F,D]");
  return {xs[0], 1, xs[1], 1, ds[0]};
}

inline std::vector<Tensor> dense_forward(const Tensor& x, const Tensor& gate_up, const Tensor& down) {
  const Sizes s = dense_sizes_of(x, gate_up, down);
  Tensor y = like(x, x.shape()), hidden = like(x, {s.tokens, 2 * s.width});
  auto run = [&](auto zero, auto launcher, auto... more) {
    using T = decltype(zero);
    return launcher(data<T>(x), data<T>(gate_up), data<T>(down), s.tokens, s.dim, s.width, data<T>(y),
                    data<T>(hidden), more...);
  };
#ifdef PADDLE_WITH_CUDA
  if (x.is_gpu()) {
    auto bytes = [&](auto /*zero*/, auto of) { return of(s.tokens, s.width, 1); };
    Tensor space = binding::workspace(binding::by_type(x, bytes, ernie5_dense_ffn_forward_cuda_workspace_bytes_f32,
                                                       ernie5_dense_ffn_forward_cuda_workspace_bytes_bf16),
                                      x);
    binding::launch("dense_ffn", x, run, ernie5_dense_ffn_forward_cuda_f32, ernie5_dense_ffn_forward_cuda_bf16,
                    space.data());
    return {y, hidden};
  }
#endif
  binding::by_type<bf16>(x, run, ernie5_dense_ffn_forward_cpu_f32, ernie5_dense_ffn_forward_cpu_bf16);
  return {y, hidden};
}

inline std::vector<Tensor> dense_backward(const Tensor& x, const Tensor& gate_up, const Tensor& down,
                                          const Tensor& hidden, const Tensor& grad_y) {
  const Sizes s = dense_sizes_of(x, gate_up, down);
  check_kind("dense_ffn", x, {&hidden, &grad_y});
  PD_CHECK(grad_y.shape() == x.shape(), "dense_ffn: the gradient of y has the shape of x");
  Tensor grad_x = like(x, x.shape()), grad_gate_up = like(x, gate_up.shape()), grad_down = like(x, down.shape());
  Tensor work = like(x, {s.tokens, s.work_width()});
  auto run = [&](auto zero, auto launcher, auto... more) {
    using T = decltype(zero);
    return launcher(data<T>(x), data<T>(gate_up), data<T>(down), data<T>(hidden), data<T>(grad_y), s.tokens, s.dim,
                    s.width, data<T>(grad_x), data<T>(grad_gate_up), data<T>(grad_down), data<T>(work), more...);
  };
#ifdef PADDLE_WITH_CUDA
  if (x.is_gpu()) {
    Tensor space = binding::workspace(ernie5_dense_ffn_backward_cuda_workspace_bytes(), x);
    binding::launch("dense_ffn", x, run, ernie5_dense_ffn_backward_cuda_f32, ernie5_dense_ffn_backward_cuda_bf16,
                    space.data());
    return {grad_x, grad_gate_up, grad_down};
  }
#endif
  binding::by_type<bf16>(x, run, ernie5_dense_ffn_backward_cpu_f32, ernie5_dense_ffn_backward_cpu_bf16);
  return {grad_x, grad_gate_up, grad_down};
}

inline std::vector<Shape> dense_infer_shape(const Shape& x, const Shape& gate_up, const Shape& /*down*/) {
  return {x, {x[0], gate_up[1]}};
}
inline std::vector<DataType> dense_infer_dtype(const DataType& x, const DataType& /*gate_up*/,
                                               const DataType& /*down*/) {
  return {x, x};
}

}  // namespace moe_ffn_binding
}  // namespace ernie5

PD_BUILD_OP(ernie5_moe_ffn)
    .Inputs({"x", "weights", "order", "offsets", "gate_up", "down"})
    .Outputs({"y", "hidden"})
    .SetKernelFn(PD_KERNEL(ernie5::moe_ffn_binding::forward))
    .SetInferShapeFn(PD_INFER_SHAPE(ernie5::moe_ffn_binding::infer_shape))
    .SetInferDtypeFn(PD_INFER_DTYPE(ernie5::moe_ffn_binding::infer_dtype));

PD_BUILD_GRAD_OP(ernie5_moe_ffn)
    .Inputs({"x", "weights", "order", "offsets", "gate_up", "down", "hidden", paddle::Grad("y")})
    .Outputs({paddle::Grad("x"), paddle::Grad("weights"), paddle::Grad("gate_up"), paddle::Grad("down")})
    .SetKernelFn(PD_KERNEL(ernie5::moe_ffn_binding::backward));

PD_BUILD_OP(ernie5_moe_ffn_backward_rows)
    .Inputs({"x", "weights", "order", "offsets", "gate_up", "down", "hidden", "grad_y"})
    .Outputs({"grad_x", "grad_weights", "work"})
    .SetKernelFn(PD_KERNEL(ernie5::moe_ffn_binding::backward_rows))
    .SetInferShapeFn(PD_INFER_SHAPE(ernie5::moe_ffn_binding::backward_rows_shape))
    .SetInferDtypeFn(PD_INFER_DTYPE(ernie5::moe_ffn_binding::backward_rows_dtype));

PD_BUILD_OP(ernie5_moe_ffn_backward_weights)
    .Inputs({paddle::Vec("x"), paddle::Vec("grad_y"), paddle::Vec("work"), paddle::Vec("order"),
             paddle::Vec("offsets"), "gate_up", "down"})
    .Outputs({"grad_gate_up", "grad_down"})
    .SetKernelFn(PD_KERNEL(ernie5::moe_ffn_binding::backward_weights))
    .SetInferShapeFn(PD_INFER_SHAPE(ernie5::moe_ffn_binding::backward_weights_shape))
    .SetInferDtypeFn(PD_INFER_DTYPE(ernie5::moe_ffn_binding::backward_weights_dtype));

PD_BUILD_OP(ernie5_dense_ffn)
    .Inputs({"x", "gate_up", "down"})
    .Outputs({"y", "hidden"})
    .SetKernelFn(PD_KERNEL(ernie5::moe_ffn_binding::dense_forward))
    .SetInferShapeFn(PD_INFER_SHAPE(ernie5::moe_ffn_binding::dense_infer_shape))
    .SetInferDtypeFn(PD_INFER_DTYPE(ernie5::moe_ffn_binding::dense_infer_dtype));

PD_BUILD_GRAD_OP(ernie5_dense_ffn)
    .Inputs({"x", "gate_up", "down", "hidden", paddle::Grad("y")})
    .Outputs({paddle::Grad("x"), paddle::Grad("gate_up"), paddle::Grad("down")})
    .SetKernelFn(PD_KERNEL(ernie5::moe_ffn_binding::dense_backward));
