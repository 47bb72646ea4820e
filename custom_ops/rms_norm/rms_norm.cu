#include "rms_norm/rms_norm_cuda.h"

#include "common/cuda.h"

namespace ernie5 {
namespace cuda {
namespace {

constexpr int64_t kMostThreads = 1024;
constexpr int64_t kRowsEach = 8;      // rows a block at least adds up for the weight's gradient
constexpr int64_t kMostParts = 1056;  // eight blocks on each multiprocessor of an H200; fixed, so that results repeat

// A block a row. The second pass reads again what its own thread has read (or written) before: first-level cache.
template <class T, int V>
__global__ void __launch_bounds__(kMostThreads)
    forward(const T* x, const T* residual, const T* weight, int64_t columns, float eps, T* y, T* sum, float* inverse) {
  __shared__ float shared[kWarp];
  int64_t start = blockIdx.x * columns;
  float squares = 0.0f;
  const int64_t packs = columns / V;
  for (int64_t i = threadIdx.x; i < packs; i += blockDim.x) {
    float s[V];
    load(s, x + start + i * V);
    if (residual != nullptr) {
      float r[V];
      load(r, residual + start + i * V);
#pragma unroll
      for (int j = 0; j < V; ++j) s[j] = widen(narrow<T>(s[j] + r[j]));
      store(sum + start + i * V, s);
    }
#pragma unroll
    for (int j = 0; j < V; ++j) squares += s[j] * s[j];
  }
  float inv = rsqrtf(sum_block(squares, shared) / static_cast<float>(columns) + eps);
  if (threadIdx.x == 0) inverse[blockIdx.x] = inv;
  const T* source = residual != nullptr ? sum : x;
  for (int64_t i = threadIdx.x; i < packs; i += blockDim.x) {
    float s[V], w[V];
    load(s, source + start + i * V);
    load(w, weight + i * V);
#pragma unroll
    for (int j = 0; j < V; ++j) s[j] *= inv * w[j];
    store(y + start + i * V, s);
  }
}

// Block b does rows [b * rows_each, ...) one after another; a thread adds the weight's gradient of its own columns in
// shared memory, which becomes row b of `partial`. Element j of every pack lies together there: no bank conflicts.
template <class T, int V>
__global__ void __launch_bounds__(kMostThreads)
    backward(const T* s, const T* weight, const float* inverse, const T* grad_y, const T* grad_sum, int64_t rows,
             int64_t columns, int64_t rows_each, T* grad_s, T* grad_residual, float* partial) {
  extern __shared__ __align__(16) float grad_weight[];
  __shared__ float shared[kWarp];
  const int64_t packs = columns / V;
  for (int64_t i = threadIdx.x; i < packs; i += blockDim.x) {
#pragma unroll
    for (int j = 0; j < V; ++j) grad_weight[j * packs + i] = 0.0f;
  }
  int64_t begin = blockIdx.x * rows_each;
  int64_t end = begin + rows_each < rows ? begin + rows_each : rows;
  for (int64_t row = begin; row < end; ++row) {
    int64_t start = row * columns;
    float inv = inverse[row], dot = 0.0f;
    for (int64_t i = threadIdx.x; i < packs; i += blockDim.x) {
      float a[V], g[V], w[V];
      load(a, s + start + i * V);
      load(g, grad_y + start + i * V);
      load(w, weight + i * V);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        dot += a[j] * g[j] * w[j];
        grad_weight[j * packs + i] += g[j] * a[j] * inv;
      }
    }
    float shrink = sum_block(dot, shared) * inv * inv * inv / static_cast<float>(columns);
    for (int64_t i = threadIdx.x; i < packs; i += blockDim.x) {
      float a[V], g[V], w[V];
      load(a, s + start + i * V);
      load(g, grad_y + start + i * V);
      load(w, weight + i * V);
#pragma unroll
      for (int j = 0; j < V; ++j) g[j] = g[j] * w[j] * inv - a[j] * shrink;
      if (grad_sum != nullptr) {
        load(a, grad_sum + start + i * V);
#pragma unroll
        for (int j = 0; j < V; ++j) g[j] += a[j];
      }
      store(grad_s + start + i * V, g);
      if (grad_residual != nullptr) store(grad_residual + start + i * V, g);
    }
  }
  for (int64_t i = threadIdx.x; i < packs; i += blockDim.x) {
    float sums[V];
#pragma unroll
    for (int j = 0; j < V; ++j) sums[j] = grad_weight[j * packs + i];
    store(partial + blockIdx.x * columns + i * V, sums);
  }
}

int64_t parts(int64_t rows) { return smaller(ceil_div(rows, kRowsEach), kMostParts); }

template <class T, int V>
int launch_forward(const T* x, const T* residual, const T* weight, int64_t rows, int64_t columns, float eps, T* y,
                   T* sum, float* inverse, cudaStream_t stream) {
  unsigned threads = threads_for(ceil_div(columns, V), kMostThreads);
  forward<T, V><<<static_cast<unsigned>(rows), threads, 0, stream>>>(x, residual, weight, columns, eps, y, sum,
                                                                     inverse);
  return launched();
}

template <class T>
int run_forward(const T* x, const T* residual, const T* weight, int64_t rows, int64_t columns, float eps, T* y, T* sum,
                float* inverse, void* stream) {
  if (rows == 0) return 0;
  if (!fits_grid(rows)) return static_cast<int>(cudaErrorInvalidValue);
  auto launch = rows_aligned<T>(columns, x, residual, weight, y, sum) ? launch_forward<T, kWide<T>>
                                                                      : launch_forward<T, 1>;
  return launch(x, residual, weight, rows, columns, eps, y, sum, inverse, as_stream(stream));
}

template <class T, int V>
int launch_backward(const T* s, const T* weight, const float* inverse, const T* grad_y, const T* grad_sum, int64_t rows,
                    int64_t columns, T* grad_s, T* grad_residual, float* partial, cudaStream_t stream) {
  unsigned threads = threads_for(ceil_div(columns, V), kMostThreads);
  auto bytes = columns * static_cast<int64_t>(sizeof(float));
  int code = allow_shared(backward<T, V>, bytes);
  if (code != 0) return code;
  int64_t rows_each = ceil_div(rows, parts(rows));
  backward<T, V><<<static_cast<unsigned>(parts(rows)), threads, static_cast<size_t>(bytes), stream>>>(
      s, weight, inverse, grad_y, grad_sum, rows, columns, rows_each, grad_s, grad_residual, partial);
  return launched();
}

template <class T>
int run_backward(const T* s, const T* weight, const float* inverse, const T* grad_y, const T* grad_sum, int64_t rows,
                 int64_t columns, T* grad_s, T* grad_residual, T* grad_weight, void* workspace, void* stream) {
  auto* partial = static_cast<float*>(workspace);
  if (rows > 0 && columns > 0) {
    auto launch = rows_aligned<T>(columns, s, weight, grad_y, grad_sum, grad_s, grad_residual)
                      ? launch_backward<T, kWide<T>>
                      : launch_backward<T, 1>;
    int code = launch(s, weight, inverse, grad_y, grad_sum, rows, columns, grad_s, grad_residual, partial,
                      as_stream(stream));
    if (code != 0) return code;
  }
  return launch_sum_rows(partial, parts(rows), columns, 1, grad_weight, as_stream(stream));
}

}  // namespace
}  // namespace cuda
}  // namespace ernie5

using namespace ernie5::cuda;

extern "C" {

int ernie5_rms_norm_forward_cuda_f32(const float* x, const float* residual, const float* weight, int64_t rows,
                                     int64_t columns, float eps, float* y, float* sum, float* inverse, void* stream) {
  return run_forward(x, residual, weight, rows, columns, eps, y, sum, inverse, stream);
}

int ernie5_rms_norm_forward_cuda_bf16(const uint16_t* x, const uint16_t* residual, const uint16_t* weight,
                                      int64_t rows, int64_t columns, float eps, uint16_t* y, uint16_t* sum,
                                      float* inverse, void* stream) {
  return run_forward(typed(x), typed(residual), typed(weight), rows, columns, eps, typed(y), typed(sum), inverse,
                     stream);
}

int64_t ernie5_rms_norm_backward_cuda_workspace_bytes(int64_t rows, int64_t columns) {
  return parts(rows) * columns * static_cast<int64_t>(sizeof(float));
}

int ernie5_rms_norm_backward_cuda_f32(const float* s, const float* weight, const float* inverse, const float* grad_y,
                                      const float* grad_sum, int64_t rows, int64_t columns, float* grad_s,
                                      float* grad_residual, float* grad_weight, void* workspace, void* stream) {
  return run_backward(s, weight, inverse, grad_y, grad_sum, rows, columns, grad_s, grad_residual, grad_weight,
                      workspace, stream);
}

int ernie5_rms_norm_backward_cuda_bf16(const uint16_t* s, const uint16_t* weight, const float* inverse,
                                       const uint16_t* grad_y, const uint16_t* grad_sum, int64_t rows,
                                       int64_t columns, uint16_t* grad_s, uint16_t* grad_residual,
                                       uint16_t* grad_weight, void* workspace, void* stream) {
  return run_backward(typed(s), typed(weight), inverse, typed(grad_y), typed(grad_sum), rows, columns, typed(grad_s),
                      typed(grad_residual), typed(grad_weight), workspace, stream);
}

}  // extern "C"
