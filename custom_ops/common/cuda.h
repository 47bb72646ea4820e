// What every CUDA kernel here needs: packs of up to 128 bits, sums over a warp or a block in a fixed order, codes.
//
// Launchers enqueue on the stream they are given and return a code: 0, a cudaError_t, or one of the codes below. They
// neither allocate nor wait; scratch memory comes from the caller, 256-byte aligned.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <limits>

namespace ernie5 {
namespace cuda {

using bf16 = __nv_bfloat16;

constexpr int kBlasMissing = 20000;  // cuBLAS could not be opened
constexpr int kBlasFailed = 10000;   // plus a cublasStatus_t
constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// N neighbouring elements that one instruction loads or stores.
template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
  T at[N];
};

// Elements in 128 bits.
template <class T>
constexpr int kWide = 16 / static_cast<int>(sizeof(T));

__device__ inline float widen(float v) { return v; }
__device__ inline float widen(bf16 v) { return __bfloat162float(v); }
template <class T>
__device__ inline T narrow(float v);
template <>
__device__ inline float narrow<float>(float v) {
  return v;
}
template <>
__device__ inline bf16 narrow<bf16>(float v) {
  return __float2bfloat16_rn(v);
}

// N elements at p, which is aligned to N elements, as floats and back.
template <int N, class T>
__device__ inline void load(float (&out)[N], const T* p) {
  Pack<T, N> pack = *reinterpret_cast<const Pack<T, N>*>(p);
#pragma unroll
  for (int i = 0; i < N; ++i) out[i] = widen(pack.at[i]);
}
template <int N, class T>
__device__ inline void store(T* p, const float (&in)[N]) {
  Pack<T, N> pack;
#pragma unroll
  for (int i = 0; i < N; ++i) pack.at[i] = narrow<T>(in[i]);
  *reinterpret_cast<Pack<T, N>*>(p) = pack;
}

__device__ inline int lane_id() { return static_cast<int>(threadIdx.x) % kWarp; }
__device__ inline int warp_id() { return static_cast<int>(threadIdx.x) / kWarp; }

struct Add {
  __device__ float operator()(float a, float b) const { return a + b; }
};
struct Max {
  __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

// Every lane gets the same bits: the butterfly adds the same pairs everywhere.
template <class Op>
__device__ inline float across_warp(float v, Op op) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) v = op(v, __shfl_xor_sync(kAllLanes, v, step));
  return v;
}

// The same over a block of whole warps, `shared` holding kWarp floats. Every thread of the block must arrive.
template <class Op>
__device__ inline float across_block(float v, float* shared, Op op, float neutral) {
  v = across_warp(v, op);
  int warps = static_cast<int>(blockDim.x) / kWarp;
  if (warps == 1) return v;
  __syncthreads();  // the last call's readers are done with `shared`
  if (lane_id() == 0) shared[warp_id()] = v;
  __syncthreads();
  return across_warp(lane_id() < warps ? shared[lane_id()] : neutral, op);
}
__device__ inline float sum_block(float v, float* shared) { return across_block(v, shared, Add(), 0.0f); }

// Sum of v over this lane and those before it.
__device__ inline int scan_warp(int v) {
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const int below = __shfl_up_sync(kAllLanes, v, static_cast<unsigned>(step));
    if (lane_id() >= step) v += below;
  }
  return v;
}

// Sum of v over this thread and those before it; `all` becomes the block's. For a block of 1024 threads; `sums` holds
// kWarp numbers in shared memory.
__device__ inline int scan_block(int v, int* sums, int& all) {
  const int inclusive = scan_warp(v);
  __syncthreads();
  if (lane_id() == kWarp - 1) sums[warp_id()] = inclusive;
  __syncthreads();
  const int of_warps = scan_warp(sums[lane_id()]);  // every warp does this for itself
  all = __shfl_sync(kAllLanes, of_warps, kWarp - 1);
  const int before = __shfl_sync(kAllLanes, of_warps, warp_id() > 0 ? warp_id() - 1 : 0);
  return inclusive + (warp_id() > 0 ? before : 0);
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Whole warps enough for `items`, at most `most` threads.
inline unsigned threads_for(int64_t items, int64_t most) {
  return static_cast<unsigned>(larger(kWarp, smaller(most, round_up(items, kWarp))));
}

template <class... Pointers>
bool aligned(int64_t bytes, Pointers... pointers) {
  uintptr_t all = 0;
  ((all |= reinterpret_cast<uintptr_t>(pointers)), ...);
  return all % static_cast<uintptr_t>(bytes) == 0;
}

// Whether rows of `width` elements of T can be moved 128 bits at a time; null pointers count as aligned.
template <class T, class... Pointers>
bool rows_aligned(int64_t width, Pointers... pointers) {
  return width % kWide<T> == 0 && aligned(16, pointers...);
}

// Launchers take bfloat16 as its 16 bits.
inline const bf16* typed(const uint16_t* p) { return reinterpret_cast<const bf16*>(p); }
inline bf16* typed(uint16_t* p) { return reinterpret_cast<bf16*>(p); }

inline cudaStream_t as_stream(void* stream) { return static_cast<cudaStream_t>(stream); }
inline int launched() { return static_cast<int>(cudaGetLastError()); }
inline bool fits_grid(int64_t blocks) { return blocks <= std::numeric_limits<int>::max(); }

// Sums of columns, in chunks of rows: block (x, y) of kWarp x kWarp threads adds rows [y * rows_each, ...) of its kWarp
// columns in a fixed order into out[y, columns]. No rows give zero.
template <class In, class Out>
__global__ void __launch_bounds__(kWarp* kWarp)
    sum_rows(const In* in, int64_t rows, int64_t columns, int64_t rows_each, Out* out) {
  __shared__ float partial[kWarp][kWarp + 1];
  int64_t column = blockIdx.x * int64_t{kWarp} + threadIdx.x;
  int64_t begin = blockIdx.y * rows_each;
  int64_t end = begin + rows_each < rows ? begin + rows_each : rows;
  float total = 0.0f;
  if (column < columns) {
#pragma unroll 8
    for (int64_t row = begin + threadIdx.y; row < end; row += kWarp) total += widen(in[row * columns + column]);
  }
  partial[threadIdx.y][threadIdx.x] = total;
  __syncthreads();
  // Warp y adds up column y of the tile: lanes are what threadIdx.y was.
  total = across_warp(partial[threadIdx.x][threadIdx.y], Add());
  column = blockIdx.x * int64_t{kWarp} + threadIdx.y;
  if (threadIdx.x == 0 && column < columns) out[blockIdx.y * columns + column] = narrow<Out>(total);
}

template <class In, class Out>
int launch_sum_rows(const In* in, int64_t rows, int64_t columns, int64_t chunks, Out* out, cudaStream_t stream) {
  if (columns == 0) return 0;
  dim3 grid(static_cast<unsigned>(ceil_div(columns, kWarp)), static_cast<unsigned>(chunks));
  sum_rows<<<grid, dim3(kWarp, kWarp), 0, stream>>>(in, rows, columns, ceil_div(rows, chunks), out);
  return launched();
}

// Lets a kernel use `bytes` of dynamic shared memory; above 48 KB the device must be asked.
template <class Kernel>
int allow_shared(Kernel kernel, int64_t bytes) {
  if (bytes <= 48 * 1024) return 0;
  auto limit = static_cast<int>(smaller(bytes, std::numeric_limits<int>::max()));
  return static_cast<int>(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, limit));
}

}  // namespace cuda
}  // namespace ernie5
