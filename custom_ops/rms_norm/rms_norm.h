// y = s * inverse * weight with inverse = 1 / sqrt(mean(s^2) + eps) over each row, s = x or x + residual.
//
// R rows, D columns, row-major and contiguous. x, residual, weight, y, sum and their gradients share one type: float
// (_f32) or bfloat16 (_bf16, given as its 16 bits); inverse is always float, and so is every sum.
//   x, residual, y, sum   [R, D]     residual may be null (then sum is not written and may be null too)
//   weight                [D]
//   inverse               f32 [R]    saved for the backward pass
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

void ernie5_rms_norm_forward_cpu_f32(const float* x, const float* residual, const float* weight, int64_t rows,
                                     int64_t columns, float eps, float* y, float* sum, float* inverse);
void ernie5_rms_norm_forward_cpu_bf16(const uint16_t* x, const uint16_t* residual, const uint16_t* weight,
                                      int64_t rows, int64_t columns, float eps, uint16_t* y, uint16_t* sum,
                                      float* inverse);

// s is x, or sum where there was a residual. grad_sum (null = none) is the gradient that reaches sum from elsewhere.
// grad_s [R, D] is the gradient of x and of residual alike; grad_residual (null = none) receives a second copy of it.
// partial is scratch of ernie5_rms_norm_partial_size(R, D) floats; the weight's gradient is summed over blocks of rows
// that depend on R only, so its bits do not depend on the number of threads.
int64_t ernie5_rms_norm_partial_size(int64_t rows, int64_t columns);
void ernie5_rms_norm_backward_cpu_f32(const float* s, const float* weight, const float* inverse, const float* grad_y,
                                      const float* grad_sum, int64_t rows, int64_t columns, float* grad_s,
                                      float* grad_residual, float* grad_weight, float* partial);
void ernie5_rms_norm_backward_cpu_bf16(const uint16_t* s, const uint16_t* weight, const float* inverse,
                                       const uint16_t* grad_y, const uint16_t* grad_sum, int64_t rows,
                                       int64_t columns, uint16_t* grad_s, uint16_t* grad_residual,
                                       uint16_t* grad_weight, float* partial);

#ifdef __cplusplus
}
#endif
