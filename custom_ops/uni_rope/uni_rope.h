// Uni-RoPE: turns the (even, odd) pairs of every head of q and k by the angles of its position.
//
// B batch, S positions, N query heads, G key heads, h head_dim (even); row-major and contiguous. q, k and the results
// share one type: float (_f32) or bfloat16 (_bf16, given as its 16 bits); the tables are always float.
//   q, q_out    [B * S, N * h]
//   k, k_out    [B * S, G * h]
//   cos, sin    f32 [B * S, h / 2]    pair i of a head is its dims 2i and 2i + 1
// sign 1 turns forward: (x0 cos - x1 sin, x1 cos + x0 sin). sign -1 turns back, which is the gradient. A result may be
// its input.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

void ernie5_uni_rope_cpu_f32(const float* q, const float* k, const float* cos, const float* sin, int64_t positions,
                             int64_t heads, int64_t groups, int64_t head_dim, float sign, float* q_out, float* k_out);
void ernie5_uni_rope_cpu_bf16(const uint16_t* q, const uint16_t* k, const float* cos, const float* sin,
                              int64_t positions, int64_t heads, int64_t groups, int64_t head_dim, float sign,
                              uint16_t* q_out, uint16_t* k_out);

#ifdef __cplusplus
}
#endif
