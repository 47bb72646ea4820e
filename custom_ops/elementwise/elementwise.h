// Sums and conversions of whole tensors: what the model does between its products, where Paddle's own loops over
// bfloat16 run on one thread, a value at a time.
#pragma once

#include <stdint.h>

#include "common/simd.h"

#ifdef __cplusplus
extern "C" {
#endif

// out [size] = the sum of `count` tensors [size], added in float in their order. out may be one of them.
void ernie5_sum_forward_cpu_f32(const float* const* tensors, int64_t count, int64_t size, float* out);
void ernie5_sum_forward_cpu_bf16(const ernie5::bf16* const* tensors, int64_t count, int64_t size, ernie5::bf16* out);
// out [size] = in [size] as the other type, to the nearest.
void ernie5_widen_forward_cpu(const ernie5::bf16* in, int64_t size, float* out);
void ernie5_narrow_forward_cpu(const float* in, int64_t size, ernie5::bf16* out);

#ifdef __cplusplus
}
#endif
