// loss = logsumexp(logits) - logits[label], row by row.
//
// N rows, V classes, row-major and contiguous. logits and their gradient are float (_f32) or bfloat16 (_bf16, given as
// its 16 bits); loss and lse are always float.
//   logits, grad_logits   [N, V]
//   labels                i64 [N]    -100 = ignored: loss 0, gradient 0. Another label outside [0, V) gives NaN.
//   loss, lse, grad_loss  f32 [N]    lse = logsumexp(logits), of ignored rows too
// A NaN or +infinity among the logits makes a row's loss NaN; -infinity is a class of probability 0.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

void ernie5_cross_entropy_forward_cpu_f32(const float* logits, const int64_t* labels, int64_t rows, int64_t classes,
                                          float* loss, float* lse);
void ernie5_cross_entropy_forward_cpu_bf16(const uint16_t* logits, const int64_t* labels, int64_t rows,
                                           int64_t classes, float* loss, float* lse);

// grad_logits = grad_loss * (softmax(logits) - one_hot(label)); grad_logits may be logits itself.
void ernie5_cross_entropy_backward_cpu_f32(const float* logits, const int64_t* labels, const float* lse,
                                           const float* grad_loss, int64_t rows, int64_t classes, float* grad_logits);
void ernie5_cross_entropy_backward_cpu_bf16(const uint16_t* logits, const int64_t* labels, const float* lse,
                                            const float* grad_loss, int64_t rows, int64_t classes,
                                            uint16_t* grad_logits);

#ifdef __cplusplus
}
#endif
