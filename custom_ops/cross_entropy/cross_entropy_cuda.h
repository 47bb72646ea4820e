// Cross entropy on CUDA: cross_entropy.h gives shapes and meaning. Every pointer is device memory; the result is 0 or a
// code for ernie5_cuda_error_text. bfloat16 travels as its 16 bits.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

int ernie5_cross_entropy_forward_cuda_f32(const float* logits, const int64_t* labels, int64_t rows, int64_t classes,
                                          float* loss, float* lse, void* stream);
int ernie5_cross_entropy_forward_cuda_bf16(const uint16_t* logits, const int64_t* labels, int64_t rows,
                                           int64_t classes, float* loss, float* lse, void* stream);

// grad_logits may be logits itself.
int ernie5_cross_entropy_backward_cuda_f32(const float* logits, const int64_t* labels, const float* lse,
                                           const float* grad_loss, int64_t rows, int64_t classes, float* grad_logits,
                                           void* stream);
int ernie5_cross_entropy_backward_cuda_bf16(const uint16_t* logits, const int64_t* labels, const float* lse,
                                            const float* grad_loss, int64_t rows, int64_t classes,
                                            uint16_t* grad_logits, void* stream);

#ifdef __cplusplus
}
#endif
