// cuBLAS for row-major matrices. The library is opened at run time (Paddle's process holds one already), so neither its
// headers nor its file are needed to compile.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace ernie5 {
namespace cuda {

constexpr int64_t kBlasWorkspace = 32 << 20;  // what NVIDIA recommends on Hopper; given, so that results repeat

enum class Element { kFloat, kBfloat16 };

constexpr int kBlasNotSupported = 15;  // the cublasStatus_t of a grouped product that this cuBLAS cannot do

// C[m,n] = op(A)[m,k] op(B)[k,n] + beta C, all contiguous; a transposed operand is stored with its sides swapped.
struct Product {
  bool transpose_a = false, transpose_b = false;
  int64_t m = 0, n = 0, k = 0;
};

// The calling thread's cuBLAS handle on the current device, made on first use, bound to a stream and a workspace.
class Blas {
 public:
  // 0, or the code of what is wrong; `workspace` holds kBlasWorkspace bytes.
  int open(cudaStream_t stream, void* workspace);

  // beta is 0 or 1.
  int gemm(Element type, const Product& shape, const void* a, const void* b, float beta, void* c) const;

  // Whether this cuBLAS has grouped products (12.5 and later) and they are not switched off.
  bool has_grouped() const;

  // `groups` products in one call; shapes are host arrays, the pointers arrays in device memory. No shape may be zero,
  // and every matrix must begin on 16 bytes.
  int grouped(Element type, int groups, const Product* shapes, const void* const* a, const void* const* b,
              void* const* c) const;

 private:
  void* handle_ = nullptr;
  cudaStream_t stream_ = nullptr;
};

}  // namespace cuda
}  // namespace ernie5

extern "C" {
// What a launcher's code means, for an error message. The text lives until the thread's next call.
const char* ernie5_cuda_error_text(int code);
// 0: grouped products are done one by one, 1: by one cuBLAS call where it can (the default). For measurements.
void ernie5_cuda_use_grouped_gemm(int use);
}
