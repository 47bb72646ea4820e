// RMSNorm on CUDA: rms_norm.h gives shapes and meaning. Every pointer is device memory; the result is 0 or a code for
// ernie5_cuda_error_text. bfloat16 travels as its 16 bits.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

int ernie5_rms_norm_forward_cuda_f32(const float* x, const float* residual, const float* weight, int64_t rows,
                                     int64_t columns, float eps, float* y, float* sum, float* inverse, void* stream);
int ernie5_rms_norm_forward_cuda_bf16(const uint16_t* x, const uint16_t* residual, const uint16_t* weight,
                                      int64_t rows, int64_t columns, float eps, uint16_t* y, uint16_t* sum,
                                      float* inverse, void* stream);

// At most 50,000 columns (their float sums lie in a block's shared memory).
int64_t ernie5_rms_norm_backward_cuda_workspace_bytes(int64_t rows, int64_t columns);
int ernie5_rms_norm_backward_cuda_f32(const float* s, const float* weight, const float* inverse, const float* grad_y,
                                      const float* grad_sum, int64_t rows, int64_t columns, float* grad_s,
                                      float* grad_residual, float* grad_weight, void* workspace, void* stream);
int ernie5_rms_norm_backward_cuda_bf16(const uint16_t* s, const uint16_t* weight, const float* inverse,
                                       const uint16_t* grad_y, const uint16_t* grad_sum, int64_t rows,
                                       int64_t columns, uint16_t* grad_s, uint16_t* grad_residual,
                                       uint16_t* grad_weight, void* workspace, void* stream);

#ifdef __cplusplus
}
#endif
