#include "uni_rope/uni_rope_cuda.h"

#include "common/cuda.h"

namespace ernie5 {
namespace cuda {
namespace {

constexpr int64_t kMostThreads = 256;

// A block a position. Its packs are those of q's heads, then those of k's; V divides a head, so a pack's angles are
// V/2 neighbours of the position's table row, which stays in the first-level cache.
template <class T, int V>
__global__ void __launch_bounds__(kMostThreads)
    rotate(const T* q, const T* k, const float* cos, const float* sin, int heads, int groups, int head_dim, float sign,
           T* q_out, T* k_out) {
  const int packs_of_head = head_dim / V, q_packs = heads * packs_of_head, k_packs = groups * packs_of_head;
  const int64_t position = blockIdx.x;
  const int64_t table = position * (head_dim / 2);
  for (int i = static_cast<int>(threadIdx.x); i < q_packs + k_packs; i += static_cast<int>(blockDim.x)) {
    const bool of_q = i < q_packs;
    const int64_t at = of_q ? (position * q_packs + i) * V : (position * k_packs + i - q_packs) * V;
    const int64_t pair = table + i % packs_of_head * (V / 2);
    float x[V], c[V / 2], s[V / 2];
    load(x, (of_q ? q : k) + at);
    load(c, cos + pair);
    load(s, sin + pair);
#pragma unroll
    for (int j = 0; j < V / 2; ++j) {
      float even = x[2 * j], odd = x[2 * j + 1], turn = s[j] * sign;
      x[2 * j] = even * c[j] - odd * turn;
      x[2 * j + 1] = odd * c[j] + even * turn;
    }
    store((of_q ? q_out : k_out) + at, x);
  }
}

template <class T, int V>
int launch(const T* q, const T* k, const float* cos, const float* sin, int64_t positions, int64_t heads, int64_t groups,
           int64_t head_dim, float sign, T* q_out, T* k_out, cudaStream_t stream) {
  unsigned threads = threads_for((heads + groups) * head_dim / V, kMostThreads);
  rotate<T, V><<<static_cast<unsigned>(positions), threads, 0, stream>>>(
      q, k, cos, sin, static_cast<int>(heads), static_cast<int>(groups), static_cast<int>(head_dim), sign, q_out,
      k_out);
  return launched();
}

template <class T>
int run(const T* q, const T* k, const float* cos, const float* sin, int64_t positions, int64_t heads, int64_t groups,
        int64_t head_dim, float sign, T* q_out, T* k_out, void* stream) {
  int64_t width = (heads + groups) * head_dim;
  if (positions == 0 || width == 0) return 0;
  if (head_dim % 2 != 0 || !fits_grid(positions) || !fits_grid(width)) return static_cast<int>(cudaErrorInvalidValue);
  if (!aligned(2 * sizeof(T), q, k, q_out, k_out)) return static_cast<int>(cudaErrorMisalignedAddress);
  constexpr int kWidest = kWide<T>;
  // A table row begins at a multiple of head_dim / 2 floats: aligned for V / 2 of them wherever V divides head_dim.
  bool wide = rows_aligned<T>(head_dim, q, k, q_out, k_out) && aligned(16, cos, sin);
  auto chosen = wide ? launch<T, kWidest> : launch<T, 2>;
  return chosen(q, k, cos, sin, positions, heads, groups, head_dim, sign, q_out, k_out, as_stream(stream));
}

}  // namespace
}  // namespace cuda
}  // namespace ernie5

using namespace ernie5::cuda;

extern "C" {

int ernie5_uni_rope_cuda_f32(const float* q, const float* k, const float* cos, const float* sin, int64_t positions,
                             int64_t heads, int64_t groups, int64_t head_dim, float sign, float* q_out, float* k_out,
                             void* stream) {
  return run(q, k, cos, sin, positions, heads, groups, head_dim, sign, q_out, k_out, stream);
}

int ernie5_uni_rope_cuda_bf16(const uint16_t* q, const uint16_t* k, const float* cos, const float* sin,
                              int64_t positions, int64_t heads, int64_t groups, int64_t head_dim, float sign,
                              uint16_t* q_out, uint16_t* k_out, void* stream) {
  return run(typed(q), typed(k), cos, sin, positions, heads, groups, head_dim, sign, typed(q_out), typed(k_out),
             stream);
}

}  // extern "C"
