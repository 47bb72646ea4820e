// Uni-RoPE on CUDA: uni_rope.h gives shapes and meaning. Every pointer is device memory; the result is 0 or a code for
// ernie5_cuda_error_text. bfloat16 travels as its 16 bits.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// A result may be its input.
int ernie5_uni_rope_cuda_f32(const float* q, const float* k, const float* cos, const float* sin, int64_t positions,
                             int64_t heads, int64_t groups, int64_t head_dim, float sign, float* q_out, float* k_out,
                             void* stream);
int ernie5_uni_rope_cuda_bf16(const uint16_t* q, const uint16_t* k, const float* cos, const float* sin,
                              int64_t positions, int64_t heads, int64_t groups, int64_t head_dim, float sign,
                              uint16_t* q_out, uint16_t* k_out, void* stream);

#ifdef __cplusplus
}
#endif
