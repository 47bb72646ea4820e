// Expert selection and its permutation on CUDA: route.h gives shapes and meaning. Every pointer is device memory; the
// result is 0 or a code for ernie5_cuda_error_text.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// Scratch of the forward pass and of permute. At most 7,000 experts (their counts lie in a block's shared memory).
int64_t ernie5_permute_cuda_workspace_bytes(int64_t tokens, int64_t num_experts, int64_t top_k);

int ernie5_route_forward_cuda_f32(const float* logits, const float* bias, const uint8_t* valid, int64_t tokens,
                                  int64_t num_experts, int64_t top_k, int softmax, float scale, int32_t* experts,
                                  float* weights, int64_t* counts, int32_t* order, int32_t* offsets, void* workspace,
                                  void* stream);

int ernie5_route_backward_cuda_f32(const float* logits, const int32_t* experts, const float* grad_weights,
                                   int64_t tokens, int64_t num_experts, int64_t top_k, int softmax, float scale,
                                   float* grad_logits, void* stream);

int ernie5_permute_forward_cuda(const int32_t* experts, int64_t tokens, int64_t num_experts, int64_t top_k,
                                int64_t* counts, int32_t* order, int32_t* offsets, void* workspace, void* stream);

#ifdef __cplusplus
}
#endif
