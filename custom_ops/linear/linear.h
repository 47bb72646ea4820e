// y = x w: a dense layer without bias, CPU launchers. x [R,D], w [D,O] (or [O,D] when `transposed`), y [R,O].
// Suffix _f32 or _bf16 names the type of every tensor; sums are in float.
#pragma once

#include <cstdint>

#include "common/simd.h"

extern "C" {

#define ERNIE5_DECLARE_LINEAR(SUFFIX, T)                                                                        \
  void ernie5_linear_forward_cpu_##SUFFIX(const T* x, const T* w, int64_t rows, int64_t dim, int64_t out,       \
                                          bool transposed, T* y);                                               \
  /* grad_x [R,D] and grad_w (the shape of w); either may be null. */                                           \
  void ernie5_linear_backward_cpu_##SUFFIX(const T* x, const T* w, const T* grad_y, int64_t rows, int64_t dim, \
                                           int64_t out, bool transposed, T* grad_x, T* grad_w);

ERNIE5_DECLARE_LINEAR(f32, float)
ERNIE5_DECLARE_LINEAR(bf16, ernie5::bf16)
#undef ERNIE5_DECLARE_LINEAR

// Whether large products run on the matrix unit (AMX): float ones too then, and faster than any library's.
int ernie5_has_matrix_unit();
}
