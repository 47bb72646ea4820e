#include "cross_entropy/cross_entropy_cuda.h"

#include <math_constants.h>

#include "common/cuda.h"

namespace ernie5 {
namespace cuda {
namespace {

constexpr int64_t kIgnored = -100;
constexpr int64_t kForwardThreads = 512;
constexpr int kBackwardThreads = 256;
constexpr int kBackwardPacks = 4;  // of each thread

// e^(x - top); before anything finite was seen, top counts as 0, so that -infinity adds 0 and a NaN stays one.
// The fast exponential's error grows with |x - top|, where the result vanishes: below 3e-7 of the largest term.
__device__ inline float power(float x, float top) { return __expf(x - (top == -CUDART_INF_F ? 0.0f : top)); }

// A block a row, read once: each thread keeps the maximum of its elements and their sum relative to it.
template <class T, int V>
__global__ void __launch_bounds__(kForwardThreads)
    forward(const T* logits, const int64_t* labels, int64_t classes, float* loss, float* lse) {
  __shared__ float shared[kWarp];
  const T* row = logits + blockIdx.x * classes;
  const int64_t packs = classes / V;
  float top = -CUDART_INF_F, total = 0.0f;
#pragma unroll 2
  for (int64_t i = threadIdx.x; i < packs; i += blockDim.x) {
    float x[V];
    load(x, row + i * V);
    float highest = x[0];
#pragma unroll
    for (int j = 1; j < V; ++j) highest = fmaxf(highest, x[j]);
    if (highest > top) {
      total *= power(top, highest);
      top = highest;
    }
#pragma unroll
    for (int j = 0; j < V; ++j) total += power(x[j], top);
  }
  float highest = across_block(top, shared, Max(), -CUDART_INF_F);
  total = sum_block(total * power(top, highest), shared);
  if (threadIdx.x != 0) return;
  float result = highest + logf(total);
  int64_t label = labels[blockIdx.x];
  lse[blockIdx.x] = result;
  if (label == kIgnored) {
    loss[blockIdx.x] = 0.0f;
  } else if (label < 0 || label >= classes) {
    loss[blockIdx.x] = CUDART_NAN_F;
  } else {
    loss[blockIdx.x] = result - widen(row[label]);
  }
}

// Block (x, y): part y of row x. Every thread reads the elements it writes, so the gradient may replace the logits.
template <class T, int V>
__global__ void __launch_bounds__(kBackwardThreads)
    backward(const T* logits, const int64_t* labels, const float* lse, const float* grad_loss, int64_t classes,
             T* grad_logits) {
  const int64_t start = blockIdx.x * classes, packs = classes / V, label = labels[blockIdx.x];
  const float shift = lse[blockIdx.x];
  float factor = grad_loss[blockIdx.x];
  const bool ignored = label == kIgnored;
  if (!ignored && (label < 0 || label >= classes || !isfinite(shift))) factor = CUDART_NAN_F;
#pragma unroll
  for (int p = 0; p < kBackwardPacks; ++p) {
    int64_t i = (blockIdx.y * int64_t{kBackwardPacks} + p) * kBackwardThreads + threadIdx.x;
    if (i >= packs) return;
    float x[V];
    load(x, logits + start + i * V);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      float probability = __expf(x[j] - shift);
      if (i * V + j == label) probability -= 1.0f;
      x[j] = ignored ? 0.0f : probability * factor;
    }
    store(grad_logits + start + i * V, x);
  }
}

template <class T, int V>
int launch_forward(const T* logits, const int64_t* labels, int64_t rows, int64_t classes, float* loss, float* lse,
                   cudaStream_t stream) {
  unsigned threads = threads_for(classes / V, kForwardThreads);
  forward<T, V><<<static_cast<unsigned>(rows), threads, 0, stream>>>(logits, labels, classes, loss, lse);
  return launched();
}

template <class T>
int run_forward(const T* logits, const int64_t* labels, int64_t rows, int64_t classes, float* loss, float* lse,
                void* stream) {
  if (rows == 0) return 0;
  if (!fits_grid(rows)) return static_cast<int>(cudaErrorInvalidValue);
  auto launch = rows_aligned<T>(classes, logits) ? launch_forward<T, kWide<T>> : launch_forward<T, 1>;
  return launch(logits, labels, rows, classes, loss, lse, as_stream(stream));
}

template <class T, int V>
int launch_backward(const T* logits, const int64_t* labels, const float* lse, const float* grad_loss, int64_t rows,
                    int64_t classes, T* grad_logits, cudaStream_t stream) {
  dim3 grid(static_cast<unsigned>(rows),
            static_cast<unsigned>(ceil_div(classes / V, int64_t{kBackwardThreads} * kBackwardPacks)));
  backward<T, V><<<grid, kBackwardThreads, 0, stream>>>(logits, labels, lse, grad_loss, classes, grad_logits);
  return launched();
}

template <class T>
int run_backward(const T* logits, const int64_t* labels, const float* lse, const float* grad_loss, int64_t rows,
                 int64_t classes, T* grad_logits, void* stream) {
  if (rows == 0 || classes == 0) return 0;
  if (!fits_grid(rows)) return static_cast<int>(cudaErrorInvalidValue);
  auto launch =
      rows_aligned<T>(classes, logits, grad_logits) ? launch_backward<T, kWide<T>> : launch_backward<T, 1>;
  return launch(logits, labels, lse, grad_loss, rows, classes, grad_logits, as_stream(stream));
}

}  // namespace
}  // namespace cuda
}  // namespace ernie5

using namespace ernie5::cuda;

extern "C" {

int ernie5_cross_entropy_forward_cuda_f32(const float* logits, const int64_t* labels, int64_t rows, int64_t classes,
                                          float* loss, float* lse, void* stream) {
  return run_forward(logits, labels, rows, classes, loss, lse, stream);
}

int ernie5_cross_entropy_forward_cuda_bf16(const uint16_t* logits, const int64_t* labels, int64_t rows,
                                           int64_t classes, float* loss, float* lse, void* stream) {
  return run_forward(typed(logits), labels, rows, classes, loss, lse, stream);
}

int ernie5_cross_entropy_backward_cuda_f32(const float* logits, const int64_t* labels, const float* lse,
                                           const float* grad_loss, int64_t rows, int64_t classes, float* grad_logits,
                                           void* stream) {
  return run_backward(logits, labels, lse, grad_loss, rows, classes, grad_logits, stream);
}

int ernie5_cross_entropy_backward_cuda_bf16(const uint16_t* logits, const int64_t* labels, const float* lse,
                                            const float* grad_loss, int64_t rows, int64_t classes,
                                            uint16_t* grad_logits, void* stream) {
  return run_backward(typed(logits), labels, lse, grad_loss, rows, classes, typed(grad_logits), stream);
}

}  // extern "C"
