// Patch embedding on CUDA: patch_embed.h gives shapes and meaning. Every pointer is device memory except mean and
// deviation, which are host memory and hold at most 64 channels; the result is 0 or a code for ernie5_cuda_error_text.
// bfloat16 travels as its 16 bits. workspace is aligned to 256 bytes; its size depends on the type of the weight.
#pragma once

#include <stdint.h>

#define ERNIE5_PATCH_EMBED_CUDA_SIZES                                                                                 \
  int64_t B, int64_t T, int64_t H, int64_t W, int64_t C, int64_t pt, int64_t ph, int64_t pw, int64_t lead, int64_t D

#ifdef __cplusplus
extern "C" {
#endif

// The forward pass goes in slabs of patches that stay in the second-level cache; the backward pass keeps all patches.
int64_t ernie5_patch_embed_forward_cuda_workspace_bytes_f32(ERNIE5_PATCH_EMBED_CUDA_SIZES);
int64_t ernie5_patch_embed_forward_cuda_workspace_bytes_bf16(ERNIE5_PATCH_EMBED_CUDA_SIZES);
int64_t ernie5_patch_embed_backward_cuda_workspace_bytes_f32(ERNIE5_PATCH_EMBED_CUDA_SIZES);
int64_t ernie5_patch_embed_backward_cuda_workspace_bytes_bf16(ERNIE5_PATCH_EMBED_CUDA_SIZES);

int ernie5_patch_embed_forward_cuda_u8_f32(const uint8_t* video, const float* weight, const float* bias,
                                           const float* mean, const float* deviation, float* tokens,
                                           ERNIE5_PATCH_EMBED_CUDA_SIZES, void* workspace, void* stream);
int ernie5_patch_embed_forward_cuda_f32_f32(const float* video, const float* weight, const float* bias,
                                            const float* mean, const float* deviation, float* tokens,
                                            ERNIE5_PATCH_EMBED_CUDA_SIZES, void* workspace, void* stream);
int ernie5_patch_embed_forward_cuda_u8_bf16(const uint8_t* video, const uint16_t* weight, const uint16_t* bias,
                                            const float* mean, const float* deviation, uint16_t* tokens,
                                            ERNIE5_PATCH_EMBED_CUDA_SIZES, void* workspace, void* stream);
int ernie5_patch_embed_forward_cuda_f32_bf16(const float* video, const uint16_t* weight, const uint16_t* bias,
                                             const float* mean, const float* deviation, uint16_t* tokens,
                                             ERNIE5_PATCH_EMBED_CUDA_SIZES, void* workspace, void* stream);

int ernie5_patch_embed_backward_cuda_u8_f32(const uint8_t* video, const float* tokens_grad, const float* mean,
                                            const float* deviation, float* weight_grad, float* bias_grad,
                                            ERNIE5_PATCH_EMBED_CUDA_SIZES, void* workspace, void* stream);
int ernie5_patch_embed_backward_cuda_f32_f32(const float* video, const float* weight, const float* tokens_grad,
                                             const float* mean, const float* deviation, float* weight_grad,
                                             float* bias_grad, float* video_grad, ERNIE5_PATCH_EMBED_CUDA_SIZES,
                                             void* workspace, void* stream);
int ernie5_patch_embed_backward_cuda_u8_bf16(const uint8_t* video, const uint16_t* tokens_grad, const float* mean,
                                             const float* deviation, uint16_t* weight_grad, uint16_t* bias_grad,
                                             ERNIE5_PATCH_EMBED_CUDA_SIZES, void* workspace, void* stream);
int ernie5_patch_embed_backward_cuda_f32_bf16(const float* video, const uint16_t* weight, const uint16_t* tokens_grad,
                                              const float* mean, const float* deviation, uint16_t* weight_grad,
                                              uint16_t* bias_grad, float* video_grad, ERNIE5_PATCH_EMBED_CUDA_SIZES,
                                              void* workspace, void* stream);

#ifdef __cplusplus
}
#endif
