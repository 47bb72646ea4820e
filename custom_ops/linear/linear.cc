#include "linear/linear.h"

#include <type_traits>

#include "common/gemm.h"
#include "common/library_gemm.h"

namespace ernie5 {
namespace {

// Products from this size on go to the library where it is there: below, its packing costs more than ours.
constexpr int64_t kLibraryProduct = 1 << 21;

template <class T>
void product(Form form, int64_t M, int64_t N, int64_t K, Rows<T> a, Rows<T> b, T* c) {
  if constexpr (std::is_same_v<T, float>) {
    if (M * N * K >= kLibraryProduct && library_gemm_available()) {
      library_gemm(form == Form::TN, form == Form::NT, M, N, K, a.data, a.stride, b.data, b.stride, c, N);
      return;
    }
  }
  gemm<T>(form, M, N, K, a, b, c, N);
}

template <class T>
void linear_forward(const T* x, const T* w, int64_t rows, int64_t dim, int64_t out, bool transposed, T* y) {
  product<T>(transposed ? Form::NT : Form::NN, rows, out, dim, {x, dim}, {w, transposed ? dim : out}, y);
}

template <class T>
void linear_backward(const T* x, const T* w, const T* grad_y, int64_t rows, int64_t dim, int64_t out, bool transposed,
                     T* grad_x, T* grad_w) {
  if (grad_x != nullptr) {
    product<T>(transposed ? Form::NN : Form::NT, rows, dim, out, {grad_y, out}, {w, transposed ? dim : out}, grad_x);
  }
  if (grad_w == nullptr) return;
  if (transposed) {
    product<T>(Form::TN, out, dim, rows, {grad_y, out}, {x, dim}, grad_w);
  } else {
    product<T>(Form::TN, dim, out, rows, {x, dim}, {grad_y, out}, grad_w);
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
}
