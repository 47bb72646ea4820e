#include "common/library_gemm.h"

#include <dlfcn.h>

#include "common/parallel.h"

namespace ernie5 {
namespace {

struct Library {
  using Gemm = int (*)(char, char, int64_t, int64_t, int64_t, float, const float*, int64_t, const float*, int64_t,
                       float, float*, int64_t);
  Gemm gemm = nullptr;
  void (*set_threads)(int) = nullptr;
  int (*max_threads)() = nullptr;

  Library() {
    void* products = dlopen("libdnnl.so.3", RTLD_NOW | RTLD_NOLOAD);
    void* threads = dlopen("libgomp.so.1", RTLD_NOW | RTLD_NOLOAD);
    if (products == nullptr || threads == nullptr) return;
    set_threads = reinterpret_cast<void (*)(int)>(dlsym(threads, "omp_set_num_threads"));
    max_threads = reinterpret_cast<int (*)()>(dlsym(threads, "omp_get_max_threads"));
    if (set_threads == nullptr || max_threads == nullptr) return;
    gemm = reinterpret_cast<Gemm>(dlsym(products, "dnnl_sgemm"));
  }
};

const Library& library() {
  static const Library found;
  return found;
}

// Has the library's runtime use the calling thread alone, for as long as this lives.
struct Alone {
  int before = library().max_threads();
  Alone() {
    if (before != 1) library().set_threads(1);
  }
  ~Alone() {
    if (before != 1) library().set_threads(before);
  }
};

}  // namespace

bool library_gemm_available() { return library().gemm != nullptr; }

void library_gemm(bool a_transposed, bool b_transposed, int64_t M, int64_t N, int64_t K, const float* a,
                  int64_t a_stride, const float* b, int64_t b_stride, float* c, int64_t c_stride) {
  const char left = a_transposed ? 'T' : 'N', right = b_transposed ? 'T' : 'N';
  const bool by_rows = M >= N;
  parallel_range(by_rows ? M : N, 64, 16, [&](int64_t begin, int64_t end, int) {
    Alone alone;
    const int64_t m0 = by_rows ? begin : 0, m = by_rows ? end - begin : M;
    const int64_t n0 = by_rows ? 0 : begin, n = by_rows ? N : end - begin;
    library().gemm(left, right, m, n, K, 1.0f, a + (a_transposed ? m0 : m0 * a_stride), a_stride,
                   b + (b_transposed ? n0 * b_stride : n0), b_stride, 0.0f, c + m0 * c_stride + n0, c_stride);
  });
}

}  // namespace ernie5
