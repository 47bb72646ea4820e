// Spatiotemporal patch embedding: video -> one token a patch; normalisation, gather and projection in one pass.
//
// Shapes: B clips, T frames of H x W pixels with C channels, patches of pt x ph x pw (H, W are multiples of ph, pw),
// T' = ceil((lead + T) / pt) (0 without frames), H' = H/ph, W' = W/pw, K = pt*ph*pw*C, D width of a token. Row-major:
//   video [B, T, H, W, C]    weight [K, D], rows in the order (frame, row, column, channel) inside a patch
//   bias [D]                 tokens [B, T'*H'*W', D]          mean, deviation [C], float, always in host memory
//
// A value v counts as (v/255 - mean)/deviation if it is a byte, as (v - mean)/deviation if it is a float.
// Time is causal: `lead` (0 .. pt-1) missing frames stand before the first one, and as many after the last as fill its
// patch. A missing frame adds nothing to a token (it is zero after normalisation) and costs nothing. With lead = pt-1
// frame 0 stands alone, frames 1..pt, pt+1..2pt, ... follow, T' = 1 + ceil((T-1)/pt), and an image is a one-frame video
// that meets the last pt-slice of the weight; lead = 0 continues a clip whose earlier frames are embedded already.
//
// Names: the type of the video (u8 or f32), then that of weight, bias and tokens (f32, or bf16 as its 16
// bits). Sums are in float.
#pragma once

#include <cstdint>

#define ERNIE5_PATCH_EMBED_SIZES                                                                                      \
  int64_t B, int64_t T, int64_t H, int64_t W, int64_t C, int64_t pt, int64_t ph, int64_t pw, int64_t lead, int64_t D

extern "C" {

void ernie5_patch_embed_forward_cpu_u8_f32(const uint8_t* video, const float* weight, const float* bias,
                                           const float* mean, const float* deviation, float* tokens,
                                           ERNIE5_PATCH_EMBED_SIZES);
void ernie5_patch_embed_forward_cpu_f32_f32(const float* video, const float* weight, const float* bias,
                                            const float* mean, const float* deviation, float* tokens,
                                            ERNIE5_PATCH_EMBED_SIZES);
void ernie5_patch_embed_forward_cpu_u8_bf16(const uint8_t* video, const uint16_t* weight, const uint16_t* bias,
                                            const float* mean, const float* deviation, uint16_t* tokens,
                                            ERNIE5_PATCH_EMBED_SIZES);
void ernie5_patch_embed_forward_cpu_f32_bf16(const float* video, const uint16_t* weight, const uint16_t* bias,
                                             const float* mean, const float* deviation, uint16_t* tokens,
                                             ERNIE5_PATCH_EMBED_SIZES);

// Gradients. `video_grad` [B, T, H, W, C] may be null where it is not wanted; a video of bytes has none. The results
// are the same bits for any number of threads.
void ernie5_patch_embed_backward_cpu_u8_f32(const uint8_t* video, const float* tokens_grad, const float* mean,
                                            const float* deviation, float* weight_grad, float* bias_grad,
                                            ERNIE5_PATCH_EMBED_SIZES);
void ernie5_patch_embed_backward_cpu_f32_f32(const float* video, const float* weight, const float* tokens_grad,
                                             const float* mean, const float* deviation, float* weight_grad,
                                             float* bias_grad, float* video_grad, ERNIE5_PATCH_EMBED_SIZES);
void ernie5_patch_embed_backward_cpu_u8_bf16(const uint8_t* video, const uint16_t* tokens_grad, const float* mean,
                                             const float* deviation, uint16_t* weight_grad,
                                             uint16_t* bias_grad, ERNIE5_PATCH_EMBED_SIZES);
void ernie5_patch_embed_backward_cpu_f32_bf16(const float* video, const uint16_t* weight,
                                              const uint16_t* tokens_grad, const float* mean,
                                              const float* deviation, uint16_t* weight_grad,
                                              uint16_t* bias_grad, float* video_grad, ERNIE5_PATCH_EMBED_SIZES);

}  // extern "C"
