#include "linear/linear.h"

#include "common/matrix_gemm.h"

namespace ernie5 {
namespace {

template <class T>
void product(Form form, int64_t M, int64_t N, int64_t K, Rows<T> a, Rows<T> b, T* c, int64_t ldc) {
  if (!matrix_gemm(form, M, N, K, a, b, c, ldc)) gemm(form, M, N, K, a, b, c, ldc);
}

template <class T>
void linear_forward(const T* x, const T* w, int64_t rows, int64_t dim, int64_t out, bool transposed, T* y) {
  product<T>(transposed ? Form::NT : Form::NN, rows, out, dim, {x, dim}, {w, transposed ? dim : out}, y, out);
}

template <class T>
void linear_backward(const T* x, const T* w, const T* grad_y, int64_t rows, int64_t dim, int64_t out, bool transposed,
                     T* grad_x, T* grad_w) {
  if (grad_x != nullptr) {
    product<T>(transposed ? Form::NN : Form::NT, rows, dim, out, {grad_y, out}, {w, transposed ? dim : out}, grad_x, dim);
  }
  if (grad_w == nullptr) return;
  if (transposed) {
    product<T>(Form::TN, out, dim, rows, {grad_y, out}, {x, dim}, grad_w, dim);
  } else {
    product<T>(Form::TN, dim, out, rows, {x, dim}, {grad_y, out}, grad_w, out);
  }
}

}  // namespace
}  // namespace ernie5

extern "C" {

#define ERNIE5_DEFINE_LINEAR(SUFFIX, T)                                                                         \
  void ernie5_linear_forward_cpu_##SUFFIX(const T* x, const T* w, int64_t rows, int64_t dim, int64_t out,       \
                                          bool transposed, T* y) {                                              \
    ernie5::linear_forward(x, w, rows, dim, out, transposed, y);                                                \
  }                                                                                                             \
  void ernie5_linear_backward_cpu_##SUFFIX(const T* x, const T* w, const T* grad_y, int64_t rows, int64_t dim, \
                                           int64_t out, bool transposed, T* grad_x, T* grad_w) {               \
    ernie5::linear_backward(x, w, grad_y, rows, dim, out, transposed, grad_x, grad_w);                          \
  }

ERNIE5_DEFINE_LINEAR(f32, float)
ERNIE5_DEFINE_LINEAR(bf16, ernie5::bf16)
#undef ERNIE5_DEFINE_LINEAR

// Of the library's own symbols the one that Python asks for.
__attribute__((visibility("default"))) int ernie5_has_matrix_unit() { return ernie5::has_matrix_unit() ? 1 : 0; }
}
