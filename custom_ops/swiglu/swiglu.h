// SwiGLU: silu(gate) * up.
//
// R rows, F width; row-major and contiguous, all of one type T: float (_f32) or bfloat16 (_bf16, given as its bits).
//   hidden, grad_hidden    [R, 2F]    gate first
//   out, grad_out          [R, F]
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

void ernie5_swiglu_forward_cpu_f32(const float* hidden, int64_t rows, int64_t width, float* out);
void ernie5_swiglu_forward_cpu_bf16(const uint16_t* hidden, int64_t rows, int64_t width, uint16_t* out);
void ernie5_swiglu_backward_cpu_f32(const float* hidden, const float* grad_out, int64_t rows, int64_t width,
                                    float* grad_hidden);
void ernie5_swiglu_backward_cpu_bf16(const uint16_t* hidden, const uint16_t* grad_out, int64_t rows, int64_t width,
                                     uint16_t* grad_hidden);

#ifdef __cplusplus
}
#endif
