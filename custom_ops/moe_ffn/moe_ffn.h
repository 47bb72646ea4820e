// Grouped SwiGLU feed-forward over stacked experts, and the same for one dense expert: CPU launchers.
//
// T tokens, K experts per token, D hidden, E experts, F expert width, R = T*K assignments. All row-major, contiguous.
//   x [T,D]; weights f32 [T,K]; order int32 [R]: assignments t*K+k by expert; offsets int32 [E+1]: expert e owns
//   order[offsets[e] .. offsets[e+1]); what lies past offsets[E] is not read. gate_up [E,D,2F], gate columns first;
//   down [E,F,D]. y[t] = sum over k of weights[t,k] * (silu(g) * u) down[e], (g, u) = x[t] gate_up[e].
// hidden [R,2F] keeps (g, u) for the backward; null when there will be none. rows [R,D] and work [R,3F+64] are scratch.
// Of tokens that come in parts the backward may be two steps: each part's without gradients of the weights (null), and
// backward_weights over all `parts` at last, whose tokens[p] tokens have x[p], grad_y[p], order[p], offsets[p] and what
// the first step left in work[p]. K and the experts are the same in all.
// Every element of every output is written: experts without tokens get zero gradients, tokens without experts zeros.
// Suffix _f32 or _bf16 names the type T of x, gate_up, down, y, hidden, rows, work and their gradients.
#pragma once

#include <cstdint>

#include "common/simd.h"

extern "C" {

#define ERNIE5_DECLARE_MOE_FFN(SUFFIX, T)                                                                              \
  void ernie5_moe_ffn_forward_cpu_##SUFFIX(const T* x, const float* weights, const int32_t* order,                     \
                                           const int32_t* offsets, const T* gate_up, const T* down, int64_t tokens,    \
                                           int64_t top_k, int64_t dim, int64_t experts, int64_t width, T* y,           \
                                           T* hidden, T* rows);                                                        \
  void ernie5_moe_ffn_backward_cpu_##SUFFIX(                                                                           \
      const T* x, const float* weights, const int32_t* order, const int32_t* offsets, const T* gate_up, const T* down, \
      const T* hidden, const T* grad_y, int64_t tokens, int64_t top_k, int64_t dim, int64_t experts, int64_t width,    \
      T* grad_x, float* grad_weights, T* grad_gate_up, T* grad_down, T* rows, T* work);                                \
  void ernie5_moe_ffn_backward_weights_cpu_##SUFFIX(                                                                   \
      const T* const* x, const T* const* grad_y, const T* const* work, const int32_t* const* order,                    \
      const int32_t* const* offsets, const int64_t* tokens, int64_t parts, int64_t top_k, int64_t dim,                 \
      int64_t experts, int64_t width, T* grad_gate_up, T* grad_down);                                                  \
  /* One expert for every row: x [rows,D], gate_up [D,2F], down [F,D], hidden [rows,2F], work [rows,3F+64]. */          \
  void ernie5_dense_ffn_forward_cpu_##SUFFIX(const T* x, const T* gate_up, const T* down, int64_t rows, int64_t dim,   \
                                             int64_t width, T* y, T* hidden);                                          \
  void ernie5_dense_ffn_backward_cpu_##SUFFIX(const T* x, const T* gate_up, const T* down, const T* hidden,            \
                                              const T* grad_y, int64_t rows, int64_t dim, int64_t width, T* grad_x,    \
                                              T* grad_gate_up, T* grad_down, T* work);

ERNIE5_DECLARE_MOE_FFN(f32, float)
ERNIE5_DECLARE_MOE_FFN(bf16, ernie5::bf16)
#undef ERNIE5_DECLARE_MOE_FFN
}
