// fp32 products of large matrices by oneDNN, whose library Paddle's wheel carries; absent elsewhere.
//
// It is built on another OpenMP runtime than the rest of the process, so each of our threads calls it for a slice of
// the result and has it stay on that thread.
#pragma once

#include <cstdint>

namespace ernie5 {

// Whether the library is in this process.
bool library_gemm_available();

// C [M,N] = A B on all threads, sums in float. A is [M,K], or [K,M] when `a_transposed`; B [K,N], or [N,K]; rows stand
// a_stride, b_stride and c_stride floats apart. Call it only where the library is available.
void library_gemm(bool a_transposed, bool b_transposed, int64_t M, int64_t N, int64_t K, const float* a,
                  int64_t a_stride, const float* b, int64_t b_stride, float* c, int64_t c_stride);

}  // namespace ernie5
