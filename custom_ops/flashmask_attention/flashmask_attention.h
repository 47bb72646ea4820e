// out = softmax(scale * q k^T + mask) v under FlashMask column intervals (arXiv 2410.01359), grouped-query heads.
//
// B batch, S query rows, M key columns, N query heads, G key/value heads (N a multiple of G), h head_dim; row-major and
// contiguous. q, k, v, out and their gradients share one type: float (_f32) or bfloat16 (_bf16, given as its 16 bits);
// lse is always float, and so is every sum.
//   q, out          [B, S, N, h]
//   k, v            [B, M, G, h]
//   intervals       i32 [B, mask_heads, M, bounds], mask_heads 1 or G
//   lse             f32 [B, N, S]     logsumexp of the scaled scores a row sees; -infinity where it sees nothing
//   workspace       f32, scratch of the size that ernie5_flashmask_attention_workspace_size names
//
// Row r of q is row query_start + r of the sequence, and the intervals count sequence rows. Key column j is hidden from
// the rows that `bounds` values a, b, c, d say, as in Paddle's flashmask_attention(startend_row_indices):
//   causal, bounds 1        a <= row,      and row < j
//   causal, bounds 2        a <= row < b,  and row < j
//   not causal, bounds 2    a <= row,      and row < b
//   not causal, bounds 4    a <= row < b,  and c <= row < d
// A row that sees no column gives 0 and passes no gradient.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// Floats of scratch for one call.
int64_t ernie5_flashmask_attention_workspace_size(int64_t batch, int64_t rows, int64_t columns, int64_t heads,
                                                  int64_t groups, int64_t head_dim, int64_t mask_heads,
                                                  int64_t backward);

void ernie5_flashmask_attention_forward_cpu_f32(const float* q, const float* k, const float* v,
                                                const int32_t* intervals, int64_t batch, int64_t rows, int64_t columns,
                                                int64_t heads, int64_t groups, int64_t head_dim, int64_t mask_heads,
                                                int64_t bounds, int64_t causal, int64_t query_start, float scale,
                                                float* out, float* lse, float* workspace);
void ernie5_flashmask_attention_forward_cpu_bf16(const uint16_t* q, const uint16_t* k, const uint16_t* v,
                                                 const int32_t* intervals, int64_t batch, int64_t rows,
                                                 int64_t columns, int64_t heads, int64_t groups, int64_t head_dim,
                                                 int64_t mask_heads, int64_t bounds, int64_t causal,
                                                 int64_t query_start, float scale, uint16_t* out, float* lse,
                                                 float* workspace);

// The gradients have the same bits for any number of threads: how sums are split depends on the shapes alone.
void ernie5_flashmask_attention_backward_cpu_f32(const float* q, const float* k, const float* v,
                                                 const int32_t* intervals, const float* out, const float* lse,
                                                 const float* grad_out, int64_t batch, int64_t rows, int64_t columns,
                                                 int64_t heads, int64_t groups, int64_t head_dim, int64_t mask_heads,
                                                 int64_t bounds, int64_t causal, int64_t query_start, float scale,
                                                 float* grad_q, float* grad_k, float* grad_v, float* workspace);
void ernie5_flashmask_attention_backward_cpu_bf16(const uint16_t* q, const uint16_t* k, const uint16_t* v,
                                                  const int32_t* intervals, const uint16_t* out, const float* lse,
                                                  const uint16_t* grad_out, int64_t batch, int64_t rows,
                                                  int64_t columns, int64_t heads, int64_t groups, int64_t head_dim,
                                                  int64_t mask_heads, int64_t bounds, int64_t causal,
                                                  int64_t query_start, float scale, uint16_t* grad_q, uint16_t* grad_k,
                                                  uint16_t* grad_v, float* workspace);

#ifdef __cplusplus
}
#endif
