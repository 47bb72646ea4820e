#include "adamw/adamw_cuda.h"

#include <cmath>

#include "common/cuda.h"

namespace ernie5 {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kUpdatePacks = 4;   // of each thread
constexpr int kSquarePacks = 8;
constexpr int kV = 4;             // elements of a pack: 128 bits of the float arrays
constexpr int64_t kUpdateEach = int64_t{kThreads} * kUpdatePacks * kV;
constexpr int kBatch = 48;        // tensors of one launch: what describes them travels as a kernel argument (4 KB)

// Tensors of one launch side by side: tensor t owns the blocks first_block[t] .. first_block[t + 1] - 1.
struct Blocks {
  int count = 0;
  int first_block[kBatch + 1] = {0};

  // Room for one more tensor of `size` elements, `each` to a block; false if the launch is full.
  bool add(int64_t size, int64_t each) {
    int64_t end = first_block[count] + ceil_div(size, each);
    if (count == kBatch || !fits_grid(end)) return false;
    first_block[++count] = static_cast<int>(end);
    return true;
  }
  unsigned total() const { return static_cast<unsigned>(first_block[count]); }

  // The tensor of a block: the last one that begins at or before it and is not empty.
  __device__ int find(int block) const {
    int low = 0, high = count - 1;
    while (low < high) {
      int middle = (low + high + 1) / 2;
      if (first_block[middle] <= block) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    return low;
  }
};

template <class G>
struct Update {
  float *parameter, *first, *second;
  const G* gradient;
  bf16* copy;
  int64_t size;
  float keep, step, epsilon;  // what decay leaves; the rate and epsilon, corrected for the moments' bias
};

template <class G>
struct Updates {
  Blocks blocks;
  float beta1, beta2, gradient_factor;
  Update<G> of[kBatch];
};
static_assert(sizeof(Updates<float>) <= 4096, "more than a kernel's arguments may hold");

template <int N, class G>
__device__ inline void update_pack(const Updates<G>& all, const Update<G>& u, int64_t i) {
  float p[N], m[N], v[N], g[N];
  load(p, u.parameter + i);
  load(m, u.first + i);
  load(v, u.second + i);
  load(g, u.gradient + i);
#pragma unroll
  for (int j = 0; j < N; ++j) {
    float gradient = g[j] * all.gradient_factor;
    m[j] = m[j] * all.beta1 + gradient * (1.0f - all.beta1);
    v[j] = v[j] * all.beta2 + gradient * gradient * (1.0f - all.beta2);
    p[j] = p[j] * u.keep - u.step * (m[j] / (sqrtf(v[j]) + u.epsilon));
  }
  store(u.parameter + i, p);
  store(u.first + i, m);
  store(u.second + i, v);
  if (u.copy != nullptr) store(u.copy + i, p);
}

__device__ inline uintptr_t bits(const void* p) { return reinterpret_cast<uintptr_t>(p); }

template <class G>
__global__ void __launch_bounds__(kThreads) update(const __grid_constant__ Updates<G> all) {
  const int tensor = all.blocks.find(static_cast<int>(blockIdx.x));
  const Update<G>& u = all.of[tensor];
  const int64_t start = (static_cast<int64_t>(blockIdx.x) - all.blocks.first_block[tensor]) * kUpdateEach;
  const bool wide = (bits(u.parameter) | bits(u.first) | bits(u.second)) % 16 == 0 &&
                    bits(u.gradient) % (kV * sizeof(G)) == 0 && bits(u.copy) % (kV * sizeof(bf16)) == 0;
#pragma unroll
  for (int p = 0; p < kUpdatePacks; ++p) {
    int64_t i = start + (int64_t{p} * kThreads + threadIdx.x) * kV;
    if (wide && i + kV <= u.size) {
      update_pack<kV>(all, u, i);
    } else {
      for (int j = 0; j < kV && i + j < u.size; ++j) update_pack<1>(all, u, i + j);
    }
  }
}

template <class G>
int run_updates(int64_t tensors, const int64_t* sizes, float* const* parameters, float* const* first,
                float* const* second, const G* const* gradients, bf16* const* copies, const float* rates,
                const float* decays, const float* first_powers, const float* second_powers, float beta1, float beta2,
                float epsilon, float gradient_factor, void* stream) {
  for (int64_t t = 0; t < tensors;) {
    Updates<G> all{};
    all.beta1 = beta1;
    all.beta2 = beta2;
    all.gradient_factor = gradient_factor;
    int64_t from = t;
    for (; t < tensors && all.blocks.add(sizes[t], kUpdateEach); ++t) {
      const float correction = std::sqrt(1.0f - second_powers[t]);
      all.of[t - from] = {parameters[t],
                          first[t],
                          second[t],
                          gradients[t],
                          copies != nullptr ? copies[t] : nullptr,
                          sizes[t],
                          1.0f - rates[t] * decays[t],
                          rates[t] * (correction / (1.0f - first_powers[t])),
                          epsilon * correction};
    }
    if (t == from) return static_cast<int>(cudaErrorInvalidValue);  // one tensor larger than a grid
    if (all.blocks.total() == 0) continue;
    update<G><<<all.blocks.total(), kThreads, 0, as_stream(stream)>>>(all);
    int code = launched();
    if (code != 0) return code;
  }
  return 0;
}

// ------------------------------------------------------- sum of squares

template <class T>
constexpr int64_t kSquareEach = int64_t{kThreads} * kSquarePacks* kWide<T>;

template <class T>
struct Squares {
  Blocks blocks;
  int64_t first_partial;
  const T* values[kBatch];
  int64_t size[kBatch];
};

__device__ inline double sum_block(double v, double* shared) {
  shared[threadIdx.x] = v;
  __syncthreads();
  for (unsigned half = blockDim.x / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) shared[threadIdx.x] += shared[threadIdx.x + half];
    __syncthreads();
  }
  return shared[0];
}

// A thread adds its few elements in float, the block its threads in double.
template <class T>
__global__ void __launch_bounds__(kThreads) square(const __grid_constant__ Squares<T> all, double* partial) {
  constexpr int V = kWide<T>;
  __shared__ double shared[kThreads];
  const int tensor = all.blocks.find(static_cast<int>(blockIdx.x));
  const T* values = all.values[tensor];
  const int64_t size = all.size[tensor];
  const int64_t start = (static_cast<int64_t>(blockIdx.x) - all.blocks.first_block[tensor]) * kSquareEach<T>;
  const bool wide = bits(values) % 16 == 0;
  float total[V] = {};
#pragma unroll
  for (int p = 0; p < kSquarePacks; ++p) {
    int64_t i = start + (int64_t{p} * kThreads + threadIdx.x) * V;
    float x[V] = {};
    if (wide && i + V <= size) {
      load(x, values + i);
    } else {
#pragma unroll
      for (int j = 0; j < V; ++j) x[j] = i + j < size ? widen(values[i + j]) : 0.0f;
    }
#pragma unroll
    for (int j = 0; j < V; ++j) total[j] += x[j] * x[j];
  }
  double sum = 0.0;
#pragma unroll
  for (int j = 0; j < V; ++j) sum += static_cast<double>(total[j]);
  sum = sum_block(sum, shared);
  if (threadIdx.x == 0) partial[all.first_partial + blockIdx.x] = sum;
}

__global__ void __launch_bounds__(1024) add_partials(const double* partial, int64_t count, double* total) {
  __shared__ double shared[1024];
  double sum = 0.0;
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) sum += partial[i];
  sum = sum_block(sum, shared);
  if (threadIdx.x == 0) *total = sum;
}

template <class T>
int run_squares(int64_t tensors, const int64_t* sizes, const T* const* values, double* total, void* workspace,
                void* stream) {
  auto* partial = static_cast<double*>(workspace);
  int64_t done = 0;
  for (int64_t t = 0; t < tensors;) {
    Squares<T> all{};
    all.first_partial = done;
    int64_t from = t;
    for (; t < tensors && all.blocks.add(sizes[t], kSquareEach<T>); ++t) {
      all.values[t - from] = values[t];
      all.size[t - from] = sizes[t];
    }
    if (t == from) return static_cast<int>(cudaErrorInvalidValue);  // one tensor larger than a grid
    if (all.blocks.total() == 0) continue;
    done += all.blocks.total();
    square<T><<<all.blocks.total(), kThreads, 0, as_stream(stream)>>>(all, partial);
    int code = launched();
    if (code != 0) return code;
  }
  add_partials<<<1, 1024, 0, as_stream(stream)>>>(partial, done, total);
  return launched();
}

}  // namespace
}  // namespace cuda
}  // namespace ernie5

using namespace ernie5::cuda;

extern "C" {

int ernie5_adamw_forward_cuda_f32(int64_t tensors, const int64_t* sizes, float* const* parameters, float* const* first,
                                  float* const* second, const float* const* gradients, uint16_t* const* copies,
                                  const float* rates, const float* decays, const float* first_powers,
                                  const float* second_powers, float beta1, float beta2, float epsilon,
                                  float gradient_factor, void* stream) {
  return run_updates(tensors, sizes, parameters, first, second, gradients, reinterpret_cast<bf16* const*>(copies),
                     rates, decays, first_powers, second_powers, beta1, beta2, epsilon, gradient_factor, stream);
}

int ernie5_adamw_forward_cuda_bf16(int64_t tensors, const int64_t* sizes, float* const* parameters,
                                   float* const* first, float* const* second, const uint16_t* const* gradients,
                                   uint16_t* const* copies, const float* rates, const float* decays,
                                   const float* first_powers, const float* second_powers, float beta1, float beta2,
                                   float epsilon, float gradient_factor, void* stream) {
  return run_updates(tensors, sizes, parameters, first, second, reinterpret_cast<const bf16* const*>(gradients),
                     reinterpret_cast<bf16* const*>(copies), rates, decays, first_powers, second_powers, beta1, beta2,
                     epsilon, gradient_factor, stream);
}

int64_t ernie5_sum_of_squares_forward_cuda_workspace_bytes(int64_t tensors, const int64_t* sizes) {
  int64_t blocks = 0;
  for (int64_t t = 0; t < tensors; ++t) blocks += ceil_div(sizes[t], kSquareEach<float>);
  return blocks * static_cast<int64_t>(sizeof(double));
}

int ernie5_sum_of_squares_forward_cuda_f32(int64_t tensors, const int64_t* sizes, const float* const* values,
                                           double* total, void* workspace, void* stream) {
  return run_squares(tensors, sizes, values, total, workspace, stream);
}

int ernie5_sum_of_squares_forward_cuda_bf16(int64_t tensors, const int64_t* sizes, const uint16_t* const* values,
                                            double* total, void* workspace, void* stream) {
  return run_squares(tensors, sizes, reinterpret_cast<const bf16* const*>(values), total, workspace, stream);
}

}  // extern "C"
