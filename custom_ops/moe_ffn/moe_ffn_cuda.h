// The grouped SwiGLU feed-forward on CUDA: moe_ffn.h gives shapes and meaning. Every pointer is device memory unless it
// is called host; the result is 0 or a code for ernie5_cuda_error_text. bfloat16 travels as its 16 bits.
//
// The matrix products are cuBLAS's, whose shapes are host numbers: host_offsets [E + 1] are the offsets in host memory.
// ernie5_moe_ffn_host_offsets_cuda fetches them (the one call here that waits, for `stream` alone); the backward pass
// can use those of the forward pass. workspace is aligned to 256 bytes.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

int ernie5_moe_ffn_host_offsets_cuda(const int32_t* offsets, int64_t experts, int32_t* host_offsets, void* stream);

// keep: whether the forward pass is given a `hidden`.
int64_t ernie5_moe_ffn_forward_cuda_workspace_bytes_f32(int64_t tokens, int64_t top_k, int64_t dim, int64_t experts,
                                                        int64_t width, int keep);
int64_t ernie5_moe_ffn_forward_cuda_workspace_bytes_bf16(int64_t tokens, int64_t top_k, int64_t dim, int64_t experts,
                                                         int64_t width, int keep);
int64_t ernie5_moe_ffn_backward_cuda_workspace_bytes_f32(int64_t tokens, int64_t top_k, int64_t dim, int64_t experts,
                                                         int64_t width);
int64_t ernie5_moe_ffn_backward_cuda_workspace_bytes_bf16(int64_t tokens, int64_t top_k, int64_t dim, int64_t experts,
                                                          int64_t width);

int ernie5_moe_ffn_forward_cuda_f32(const float* x, const float* weights, const int32_t* order, const int32_t* offsets,
                                    const float* gate_up, const float* down, int64_t tokens, int64_t top_k, int64_t dim,
                                    int64_t experts, int64_t width, float* y, float* hidden, float* rows,
                                    const int32_t* host_offsets, void* workspace, void* stream);
int ernie5_moe_ffn_forward_cuda_bf16(const uint16_t* x, const float* weights, const int32_t* order,
                                     const int32_t* offsets, const uint16_t* gate_up, const uint16_t* down,
                                     int64_t tokens, int64_t top_k, int64_t dim, int64_t experts, int64_t width,
                                     uint16_t* y, uint16_t* hidden, uint16_t* rows, const int32_t* host_offsets,
                                     void* workspace, void* stream);

int ernie5_moe_ffn_backward_cuda_f32(const float* x, const float* weights, const int32_t* order, const int32_t* offsets,
                                     const float* gate_up, const float* down, const float* hidden, const float* grad_y,
                                     int64_t tokens, int64_t top_k, int64_t dim, int64_t experts, int64_t width,
                                     float* grad_x, float* grad_weights, float* grad_gate_up, float* grad_down,
                                     float* rows, float* work, const int32_t* host_offsets, void* workspace,
                                     void* stream);
int ernie5_moe_ffn_backward_cuda_bf16(const uint16_t* x, const float* weights, const int32_t* order,
                                      const int32_t* offsets, const uint16_t* gate_up, const uint16_t* down,
                                      const uint16_t* hidden, const uint16_t* grad_y, int64_t tokens, int64_t top_k,
                                      int64_t dim, int64_t experts, int64_t width, uint16_t* grad_x,
                                      float* grad_weights, uint16_t* grad_gate_up, uint16_t* grad_down, uint16_t* rows,
                                      uint16_t* work, const int32_t* host_offsets, void* workspace, void* stream);

// One dense expert for every row; hidden may be null where there is no backward pass.
int64_t ernie5_dense_ffn_forward_cuda_workspace_bytes_f32(int64_t rows, int64_t width, int keep);
int64_t ernie5_dense_ffn_forward_cuda_workspace_bytes_bf16(int64_t rows, int64_t width, int keep);
int64_t ernie5_dense_ffn_backward_cuda_workspace_bytes(void);
int ernie5_dense_ffn_forward_cuda_f32(const float* x, const float* gate_up, const float* down, int64_t rows,
                                      int64_t dim, int64_t width, float* y, float* hidden, void* workspace,
                                      void* stream);
int ernie5_dense_ffn_forward_cuda_bf16(const uint16_t* x, const uint16_t* gate_up, const uint16_t* down, int64_t rows,
                                       int64_t dim, int64_t width, uint16_t* y, uint16_t* hidden, void* workspace,
                                       void* stream);
int ernie5_dense_ffn_backward_cuda_f32(const float* x, const float* gate_up, const float* down, const float* hidden,
                                       const float* grad_y, int64_t rows, int64_t dim, int64_t width, float* grad_x,
                                       float* grad_gate_up, float* grad_down, float* work, void* workspace,
                                       void* stream);
int ernie5_dense_ffn_backward_cuda_bf16(const uint16_t* x, const uint16_t* gate_up, const uint16_t* down,
                                        const uint16_t* hidden, const uint16_t* grad_y, int64_t rows, int64_t dim,
                                        int64_t width, uint16_t* grad_x, uint16_t* grad_gate_up, uint16_t* grad_down,
                                        uint16_t* work, void* workspace, void* stream);

#ifdef __cplusplus
}
#endif
