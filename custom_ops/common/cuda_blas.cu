#include "common/cuda_blas.h"

#include <dlfcn.h>
#include <library_types.h>

#include <atomic>
#include <cstdio>
#include <vector>

#include "common/cuda.h"

namespace ernie5 {
namespace cuda {
namespace {

// The part of cuBLAS's C interface that is used; names, order and values are stable across its releases 11 to 13.
constexpr int kNoTranspose = 0, kTranspose = 1;
constexpr int kCompute32F = 68, kDefaultAlgorithm = -1;
constexpr int kNoReducedPrecisionReduction = 16;  // split sums of bf16 products stay in float
using Create = int (*)(void** handle);
using SetStream = int (*)(void* handle, cudaStream_t stream);
using SetWorkspace = int (*)(void* handle, void* workspace, size_t bytes);
using SetMathMode = int (*)(void* handle, int mode);
using GemmEx = int (*)(void* handle, int op_a, int op_b, int m, int n, int k, const void* alpha, const void* a,
                       cudaDataType a_type, int lda, const void* b, cudaDataType b_type, int ldb, const void* beta,
                       void* c, cudaDataType c_type, int ldc, int compute, int algorithm);
using GroupedEx = int (*)(void* handle, const int* op_a, const int* op_b, const int* m, const int* n, const int* k,
                          const void* alpha, const void* const* a, cudaDataType a_type, const int* lda,
                          const void* const* b, cudaDataType b_type, const int* ldb, const void* beta, void* const* c,
                          cudaDataType c_type, const int* ldc, int groups, const int* group_size, int compute);

struct Library {
  Create create = nullptr;
  SetStream set_stream = nullptr;
  SetWorkspace set_workspace = nullptr;
  SetMathMode set_math_mode = nullptr;
  GemmEx gemm_ex = nullptr;
  GroupedEx grouped_ex = nullptr;  // null before cuBLAS 12.5

  Library() {
    void* file = find();
    if (file == nullptr) return;
    set_stream = reinterpret_cast<SetStream>(dlsym(file, "cublasSetStream_v2"));
    set_workspace = reinterpret_cast<SetWorkspace>(dlsym(file, "cublasSetWorkspace_v2"));
    set_math_mode = reinterpret_cast<SetMathMode>(dlsym(file, "cublasSetMathMode"));
    gemm_ex = reinterpret_cast<GemmEx>(dlsym(file, "cublasGemmEx"));
    grouped_ex = reinterpret_cast<GroupedEx>(dlsym(file, "cublasGemmGroupedBatchedEx"));
    if (set_stream != nullptr && set_workspace != nullptr && set_math_mode != nullptr && gemm_ex != nullptr) {
      create = reinterpret_cast<Create>(dlsym(file, "cublasCreate_v2"));
    }
  }

  static void* find() {
    const char* names[] = {"libcublas.so.13", "libcublas.so.12", "libcublas.so.11", "libcublas.so"};
    for (int mode : {RTLD_NOW | RTLD_NOLOAD, RTLD_NOW}) {
      for (const char* name : names) {
        void* file = dlopen(name, mode);
        if (file != nullptr) return file;
      }
    }
    return nullptr;
  }
};

const Library& library() {
  static const Library found;
  return found;
}

std::atomic<bool> grouped_allowed{true};

// Handles live as long as the process: at a thread's end the driver may be gone already.
void*& thread_handle(int device) {
  static thread_local std::vector<void*> handles;
  if (static_cast<size_t>(device) >= handles.size()) handles.resize(static_cast<size_t>(device) + 1, nullptr);
  return handles[static_cast<size_t>(device)];
}

int blas_code(int status) { return status == 0 ? 0 : kBlasFailed + status; }
cudaDataType data_type(Element type) { return type == Element::kFloat ? CUDA_R_32F : CUDA_R_16BF; }
int operation(bool transpose) { return transpose ? kTranspose : kNoTranspose; }

bool fits_int(const Product& shape) {
  const int64_t most = std::numeric_limits<int>::max();
  return shape.m <= most && shape.n <= most && shape.k <= most;
}

// cuBLAS counts columns first: it is asked for Cᵀ = op(B)ᵀ op(A)ᵀ, whose memory is that of C.
struct Sides {
  int m, n, k, lda, ldb;
  explicit Sides(const Product& shape)
      : m(static_cast<int>(shape.m)),
        n(static_cast<int>(shape.n)),
        k(static_cast<int>(shape.k)),
        lda(shape.transpose_a ? m : k),
        ldb(shape.transpose_b ? k : n) {}
};

}  // namespace

int Blas::open(cudaStream_t stream, void* workspace) {
  if (library().create == nullptr) return kBlasMissing;
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return static_cast<int>(error);
  void*& handle = thread_handle(device);
  if (handle == nullptr) {
    int status = library().create(&handle);
    if (status != 0) {
      handle = nullptr;
      return blas_code(status);
    }
    status = library().set_math_mode(handle, kNoReducedPrecisionReduction);
    if (status != 0) return blas_code(status);
  }
  handle_ = handle;
  stream_ = stream;
  int status = library().set_stream(handle_, stream);  // forgets the workspace, hence the order
  if (status == 0) status = library().set_workspace(handle_, workspace, static_cast<size_t>(kBlasWorkspace));
  return blas_code(status);
}

int Blas::gemm(Element type, const Product& shape, const void* a, const void* b, float beta, void* c) const {
  if (shape.m == 0 || shape.n == 0) return 0;
  if (!fits_int(shape)) return static_cast<int>(cudaErrorInvalidValue);
  if (shape.k == 0) {  // an empty sum, which cuBLAS is not asked for
    if (beta != 0.0f) return beta == 1.0f ? 0 : static_cast<int>(cudaErrorInvalidValue);
    auto bytes = static_cast<size_t>(shape.m * shape.n) * (type == Element::kFloat ? 4 : 2);
    return static_cast<int>(cudaMemsetAsync(c, 0, bytes, stream_));
  }
  const float alpha = 1.0f;
  Sides s(shape);
  cudaDataType t = data_type(type);
  return blas_code(library().gemm_ex(handle_, operation(shape.transpose_b), operation(shape.transpose_a), s.n, s.m, s.k,
                                     &alpha, b, t, s.ldb, a, t, s.lda, &beta, c, t, s.n, kCompute32F,
                                     kDefaultAlgorithm));
}

bool Blas::has_grouped() const { return grouped_allowed.load() && library().grouped_ex != nullptr; }

int Blas::grouped(Element type, int groups, const Product* shapes, const void* const* a, const void* const* b,
                  void* const* c) const {
  if (groups == 0) return 0;
  auto count = static_cast<size_t>(groups);
  // One block of integers for the nine arrays the call wants; cuBLAS reads them before it returns.
  static thread_local std::vector<int> numbers;
  static thread_local std::vector<float> factors;
  numbers.assign(9 * count, 1);
  factors.assign(2 * count, 0.0f);
  int* array[9];
  for (size_t i = 0; i < 9; ++i) array[i] = numbers.data() + i * count;
  for (size_t g = 0; g < count; ++g) {
    if (!fits_int(shapes[g])) return static_cast<int>(cudaErrorInvalidValue);
    Sides s(shapes[g]);
    int values[8] = {operation(shapes[g].transpose_b), operation(shapes[g].transpose_a), s.n, s.m, s.k, s.ldb, s.lda,
                     s.n};
    for (size_t i = 0; i < 8; ++i) array[i][g] = values[i];
    factors[g] = 1.0f;
  }
  cudaDataType t = data_type(type);
  return blas_code(library().grouped_ex(handle_, array[0], array[1], array[2], array[3], array[4], factors.data(), b, t,
                                        array[5], a, t, array[6], factors.data() + count, c, t, array[7], groups,
                                        array[8], kCompute32F));
}

}  // namespace cuda
}  // namespace ernie5

extern "C" const char* ernie5_cuda_error_text(int code) {
  static thread_local char text[96];
  using namespace ernie5::cuda;
  if (code < kBlasFailed) return cudaGetErrorString(static_cast<cudaError_t>(code));
  if (code == kBlasMissing) return "cuBLAS not found (libcublas.so.13, .12 or .11 on the loader's path)";
  const char* meaning = code - kBlasFailed == kBlasNotSupported ? " (not supported)" : "";
  std::snprintf(text, sizeof text, "cuBLAS status %d%s", code - kBlasFailed, meaning);
  return text;
}

extern "C" void ernie5_cuda_use_grouped_gemm(int use) { ernie5::cuda::grouped_allowed = use != 0; }
