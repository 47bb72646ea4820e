// Expert selection: top-k of score + bias, combine weights from the unbiased scores, and the permutation that groups
// the assignments by expert.
//
// T tokens, E experts, K experts a token; assignment a = t * K + k. All arrays are row-major and contiguous.
//   logits       f32 [T, E]
//   bias         f32 [E]        shifts the selection only
//   valid        u8 [T]         0 = padding: its experts are -1 and its weights 0
//   experts      i32 [T, K]     by falling score + bias; of equals the lower expert comes first; -1 = not routed
//   weights      f32 [T, K]     scale * score / max(sum of the K scores, 1e-12)
//   counts       i64 [E]        routed tokens of each expert
//   order        i32 [T * K]    routed assignments grouped by expert, rising within one; then -1
//   offsets      i32 [E + 1]    the assignments of expert e are order[offsets[e] : offsets[e + 1]]
// A NaN counts as the lowest of all scores when experts are chosen; it reaches the weights of a token that chose it.
// 1 <= K <= E, T * K < 2^31.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// softmax != 0: scores = softmax(logits) over E; else sigmoid(logits).
void ernie5_route_forward_cpu_f32(const float* logits, const float* bias, const uint8_t* valid, int64_t tokens,
                                  int64_t num_experts, int64_t top_k, int softmax, float scale, int32_t* experts,
                                  float* weights, int64_t* counts, int32_t* order, int32_t* offsets);

// grad_weights [T, K] -> grad_logits [T, E], every element written.
void ernie5_route_backward_cpu_f32(const float* logits, const int32_t* experts, const float* grad_weights,
                                   int64_t tokens, int64_t num_experts, int64_t top_k, int softmax, float scale,
                                   float* grad_logits);

// Counts, order and offsets of experts that were chosen elsewhere; whatever lies outside [0, E) is not routed.
void ernie5_permute_forward_cpu(const int32_t* experts, int64_t tokens, int64_t num_experts, int64_t top_k,
                                int64_t* counts, int32_t* order, int32_t* offsets);

#ifdef __cplusplus
}
#endif
