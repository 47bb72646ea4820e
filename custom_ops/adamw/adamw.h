// AdamW over many tensors in one call, with the meaning of paddle.optimizer.AdamW; and their sum of squares.
//
// Tensor i of `tensors` has sizes[i] elements. With g = gradient_factor * gradient:
//   parameter -= rate * decay * parameter
//   first      = beta1 * first + (1 - beta1) * g
//   second     = beta2 * second + (1 - beta2) * g^2
//   parameter -= rate / (1 - first_power) * first / (sqrt(second / (1 - second_power)) + epsilon)
// where first_power and second_power are beta1^step and beta2^step of this step (the caller advances them) and rate is
// the tensor's own learning rate. Parameters and moments are float; gradients float (_f32) or bfloat16 (_bf16).
// copies: null, or per tensor null or where the new parameter is written in bfloat16.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

void ernie5_adamw_forward_cpu_f32(int64_t tensors, const int64_t* sizes, float* const* parameters,
                                  float* const* first, float* const* second, const float* const* gradients,
                                  uint16_t* const* copies, const float* rates, const float* decays,
                                  const float* first_powers, const float* second_powers, float beta1, float beta2,
                                  float epsilon, float gradient_factor);
void ernie5_adamw_forward_cpu_bf16(int64_t tensors, const int64_t* sizes, float* const* parameters,
                                   float* const* first, float* const* second, const uint16_t* const* gradients,
                                   uint16_t* const* copies, const float* rates, const float* decays,
                                   const float* first_powers, const float* second_powers, float beta1, float beta2,
                                   float epsilon, float gradient_factor);

// total[0] = sum of the squares of all elements; blocks of a fixed size are added in order, so the bits do not depend
// on the number of threads.
void ernie5_sum_of_squares_forward_cpu_f32(int64_t tensors, const int64_t* sizes, const float* const* values,
                                           double* total);
void ernie5_sum_of_squares_forward_cpu_bf16(int64_t tensors, const int64_t* sizes, const uint16_t* const* values,
                                            double* total);

#ifdef __cplusplus
}
#endif
