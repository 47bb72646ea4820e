// AdamW and the sum of squares on CUDA: adamw.h gives shapes and meaning. The arrays of sizes, numbers and pointers lie
// in host memory and are read before the call returns; the pointers in them, total and workspace are device memory. The
// result is 0 or a code for ernie5_cuda_error_text. bfloat16 travels as its 16 bits.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

int ernie5_adamw_forward_cuda_f32(int64_t tensors, const int64_t* sizes, float* const* parameters, float* const* first,
                                  float* const* second, const float* const* gradients, uint16_t* const* copies,
                                  const float* rates, const float* decays, const float* first_powers,
                                  const float* second_powers, float beta1, float beta2, float epsilon,
                                  float gradient_factor, void* stream);
int ernie5_adamw_forward_cuda_bf16(int64_t tensors, const int64_t* sizes, float* const* parameters,
                                   float* const* first, float* const* second, const uint16_t* const* gradients,
                                   uint16_t* const* copies, const float* rates, const float* decays,
                                   const float* first_powers, const float* second_powers, float beta1, float beta2,
                                   float epsilon, float gradient_factor, void* stream);

// The bits of the result depend on the sizes alone.
int64_t ernie5_sum_of_squares_forward_cuda_workspace_bytes(int64_t tensors, const int64_t* sizes);
int ernie5_sum_of_squares_forward_cuda_f32(int64_t tensors, const int64_t* sizes, const float* const* values,
                                           double* total, void* workspace, void* stream);
int ernie5_sum_of_squares_forward_cuda_bf16(int64_t tensors, const int64_t* sizes, const uint16_t* const* values,
                                            double* total, void* workspace, void* stream);

#ifdef __cplusplus
}
#endif
