#include "route/route_cuda.h"

#include <math_constants.h>

#include "common/cuda.h"

namespace ernie5 {
namespace cuda {
namespace {

constexpr float kSmallestSum = 1e-12f;
constexpr int kMostTokenWarps = 8;                  // tokens of a block when experts are chosen, a warp each
constexpr int64_t kTokenShared = 48 * 1024;         // their keys, while they fit
constexpr int kSortWarps = 8;                       // warps of a block of the counting sort
constexpr int kWarpSteps = 8;                       // of 32 assignments each
constexpr int kWarpItems = kWarpSteps * kWarp;      // neighbouring assignments of a warp
constexpr int kBlockItems = kSortWarps * kWarpItems;
constexpr int kScanThreads = 1024;
constexpr int kBatch = 8;                           // loads under way together in the scan

// ------------------------------------------------------- scores and selection: a warp a token

// Turns a row's logits into scores. Every lane holds the same numbers.
struct Scores {
  bool softmax;
  float top = 0.0f, total = 1.0f;

  __device__ Scores(const float* row, int64_t num_experts, bool use_softmax) : softmax(use_softmax) {
    if (!softmax) return;
    top = -CUDART_INF_F;
    for (int64_t e = lane_id(); e < num_experts; e += kWarp) top = fmaxf(top, row[e]);
    top = across_warp(top, Max());
    total = 0.0f;
    for (int64_t e = lane_id(); e < num_experts; e += kWarp) total += expf(row[e] - top);
    total = across_warp(total, Add());
  }
  __device__ float operator()(float logit) const {
    return softmax ? expf(logit - top) / total : 1.0f / (1.0f + expf(-logit));
  }
};

// A number that sorts as the float does, from 0x007fffff (-infinity, and NaN) up; 0 is free to mean "taken".
__device__ inline unsigned sortable(float v) {
  v = v == v ? v + 0.0f : -CUDART_INF_F;  // + 0 makes one zero of two
  unsigned bits = __float_as_uint(v);
  return (bits >> 31) != 0 ? ~bits : bits | 0x80000000u;
}

__global__ void __launch_bounds__(kMostTokenWarps* kWarp)
    choose(const float* logits, const float* bias, const uint8_t* valid, int64_t tokens, int num_experts, int top_k,
           bool softmax, float scale, int32_t* experts, float* weights) {
  extern __shared__ unsigned all_keys[];
  unsigned* keys = all_keys + warp_id() * num_experts;  // a lane reads and writes entries lane, lane + 32, ... only
  const int64_t token = blockIdx.x * static_cast<int64_t>(blockDim.x / kWarp) + warp_id();
  if (token >= tokens) return;
  const int lane = lane_id();
  int32_t* chosen = experts + token * top_k;
  float* out = weights + token * top_k;
  if (valid[token] == 0) {
    for (int k = lane; k < top_k; k += kWarp) {
      chosen[k] = -1;
      out[k] = 0.0f;
    }
    return;
  }
  const float* row = logits + token * num_experts;
  const Scores score(row, num_experts, softmax);
  for (int e = lane; e < num_experts; e += kWarp) keys[e] = sortable(score(row[e]) + bias[e]);
  float total = 0.0f;
  for (int k = 0; k < top_k; ++k) {
    unsigned best = 0;
    int index = num_experts;
    for (int e = lane; e < num_experts; e += kWarp) {
      if (keys[e] > best) {  // the first of equals stays
        best = keys[e];
        index = e;
      }
    }
    const unsigned highest = __reduce_max_sync(kAllLanes, best);
    index = __reduce_min_sync(kAllLanes, best == highest ? index : num_experts);
    if (index % kWarp == lane) keys[index] = 0;
    const float value = score(row[index]);
    total += value;
    if (lane == 0) {
      chosen[k] = index;
      out[k] = value;
    }
  }
  __syncwarp();
  const float factor = scale / (total < kSmallestSum ? kSmallestSum : total);
  for (int k = lane; k < top_k; k += kWarp) out[k] *= factor;
}

__global__ void __launch_bounds__(kMostTokenWarps* kWarp)
    choose_backward(const float* logits, const int32_t* experts, const float* grad_weights, int64_t tokens,
                    int num_experts, int top_k, bool softmax, float scale, float* grad_logits) {
  const int64_t token = blockIdx.x * static_cast<int64_t>(blockDim.x / kWarp) + warp_id();
  if (token >= tokens) return;
  const int lane = lane_id();
  const float* row = logits + token * num_experts;
  float* out = grad_logits + token * num_experts;
  const int32_t* chosen = experts + token * top_k;
  const float* grad = grad_weights + token * top_k;
  if (chosen[0] < 0) {
    for (int e = lane; e < num_experts; e += kWarp) out[e] = 0.0f;
    return;
  }
  const Scores score(row, num_experts, softmax);
  float total = 0.0f, along = 0.0f;
  for (int k = lane; k < top_k; k += kWarp) {
    const float value = score(row[chosen[k]]);
    total += value;
    along += value * grad[k];
  }
  total = across_warp(total, Add());
  along = across_warp(along, Add());
  const bool clipped = total < kSmallestSum;
  const float inverse = 1.0f / (clipped ? kSmallestSum : total);
  const float shift = clipped ? 0.0f : along * inverse;
  float inner = 0.0f;  // of the softmax: the gradients of the scores times the scores
  for (int k = lane; k < top_k; k += kWarp) inner += (grad[k] - shift) * inverse * scale * score(row[chosen[k]]);
  inner = softmax ? across_warp(inner, Add()) : 0.0f;
  for (int e = lane; e < num_experts; e += kWarp) out[e] = softmax ? -score(row[e]) * inner : 0.0f;
  __syncwarp();
  for (int k = lane; k < top_k; k += kWarp) {
    const float value = score(row[chosen[k]]), part = (grad[k] - shift) * inverse * scale;
    out[chosen[k]] = softmax ? value * (part - inner) : part * value * (1.0f - value);
  }
}

// ------------------------------------------------------- permutation: a stable counting sort in three launches

// Visits the warp's assignments in order, 32 at a time: body(assignment, expert, mates, leads) on every lane, `mates`
// being the lanes with the same expert and `leads` whether this is their first. Expert -1: not routed.
template <class Body>
__device__ inline void over_items(const int32_t* experts, int64_t items, int num_experts, Body&& body) {
  const int64_t begin = blockIdx.x * int64_t{kBlockItems} + warp_id() * kWarpItems + lane_id();
#pragma unroll
  for (int step = 0; step < kWarpSteps; ++step) {
    const int64_t item = begin + step * kWarp;
    int expert = item < items ? experts[item] : -1;
    if (static_cast<unsigned>(expert) >= static_cast<unsigned>(num_experts)) expert = -1;
    const unsigned mates = __match_any_sync(kAllLanes, expert);
    body(item, expert, mates, __ffs(static_cast<int>(mates)) - 1 == lane_id());
    __syncwarp();
  }
}

// counts [kSortWarps, E] in shared memory: how many assignments of each expert each warp of this block has.
__device__ inline void count_by_warp(const int32_t* experts, int64_t items, int num_experts, int* counts) {
  for (int i = static_cast<int>(threadIdx.x); i < kSortWarps * num_experts; i += kSortWarps * kWarp) counts[i] = 0;
  __syncthreads();
  int* mine = counts + warp_id() * num_experts;
  over_items(experts, items, num_experts, [&](int64_t, int expert, unsigned mates, bool leads) {
    if (expert >= 0 && leads) mine[expert] += __popc(mates);
  });
  __syncthreads();
}

// block_counts [blocks, E]
__global__ void __launch_bounds__(kSortWarps* kWarp)
    count_experts(const int32_t* experts, int64_t items, int num_experts, int* block_counts) {
  extern __shared__ int counts[];
  count_by_warp(experts, items, num_experts, counts);
  for (int e = static_cast<int>(threadIdx.x); e < num_experts; e += kSortWarps * kWarp) {
    int total = 0;
    for (int warp = 0; warp < kSortWarps; ++warp) total += counts[warp * num_experts + e];
    block_counts[int64_t{blockIdx.x} * num_experts + e] = total;
  }
}

// One block: block_counts become what the blocks before have of the same expert; counts and offsets of all.
__global__ void __launch_bounds__(kScanThreads)
    scan_counts(int* block_counts, int blocks, int num_experts, int64_t* counts, int32_t* offsets) {
  __shared__ int sums[kWarp];
  int before = 0;  // assignments of the experts of earlier rounds
  for (int first = 0; first < num_experts; first += kScanThreads) {
    const int e = first + static_cast<int>(threadIdx.x);
    int total = 0;
    for (int block = 0; e < num_experts && block < blocks; block += kBatch) {
      int here[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        here[i] = block + i < blocks ? block_counts[int64_t{block + i} * num_experts + e] : 0;
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (block + i < blocks) block_counts[int64_t{block + i} * num_experts + e] = total;
        total += here[i];
      }
    }
    int all = 0;
    const int through = scan_block(total, sums, all);
    if (e < num_experts) {
      counts[e] = total;
      offsets[e] = before + through - total;
    }
    before += all;
  }
  if (threadIdx.x == 0) offsets[num_experts] = before;
}

__global__ void __launch_bounds__(kSortWarps* kWarp)
    place_experts(const int32_t* experts, int64_t items, int num_experts, const int* block_counts,
                  const int32_t* offsets, int32_t* order) {
  extern __shared__ int places[];
  count_by_warp(experts, items, num_experts, places);
  for (int e = static_cast<int>(threadIdx.x); e < num_experts; e += kSortWarps * kWarp) {
    int place = offsets[e] + block_counts[int64_t{blockIdx.x} * num_experts + e];
    for (int warp = 0; warp < kSortWarps; ++warp) {
      const int here = places[warp * num_experts + e];
      places[warp * num_experts + e] = place;
      place += here;
    }
  }
  __syncthreads();
  const int routed = offsets[num_experts];
  int* mine = places + warp_id() * num_experts;
  over_items(experts, items, num_experts, [&](int64_t item, int expert, unsigned mates, bool leads) {
    if (item >= routed && item < items) order[item] = -1;  // the unused end, which no assignment is placed in
    const int first = expert >= 0 ? mine[expert] : 0;
    __syncwarp();
    if (expert < 0) return;
    order[first + __popc(mates & ((1u << lane_id()) - 1u))] = static_cast<int32_t>(item);
    if (leads) mine[expert] = first + __popc(mates);
  });
}

// ------------------------------------------------------- launches

bool too_large(int64_t tokens, int64_t num_experts, int64_t top_k) {
  return !fits_grid(tokens * top_k) || !fits_grid(num_experts * kSortWarps) || top_k < 1 || top_k > num_experts;
}

int run_permute(const int32_t* experts, int64_t tokens, int64_t num_experts, int64_t top_k, int64_t* counts,
                int32_t* order, int32_t* offsets, void* workspace, cudaStream_t stream) {
  const int64_t items = tokens * top_k;
  const auto blocks = static_cast<unsigned>(ceil_div(items, kBlockItems));
  const auto width = static_cast<int>(num_experts);
  const int64_t shared = kSortWarps * num_experts * static_cast<int64_t>(sizeof(int));
  auto* block_counts = static_cast<int*>(workspace);
  int code = allow_shared(count_experts, shared);
  if (code == 0) code = allow_shared(place_experts, shared);
  if (code != 0) return code;
  constexpr int kThreads = kSortWarps * kWarp;
  if (blocks > 0) {
    count_experts<<<blocks, kThreads, static_cast<size_t>(shared), stream>>>(experts, items, width, block_counts);
  }
  scan_counts<<<1, kScanThreads, 0, stream>>>(block_counts, static_cast<int>(blocks), width, counts, offsets);
  if (blocks > 0) {
    place_experts<<<blocks, kThreads, static_cast<size_t>(shared), stream>>>(experts, items, width, block_counts,
                                                                             offsets, order);
  }
  return launched();
}

}  // namespace
}  // namespace cuda
}  // namespace ernie5

using namespace ernie5::cuda;

extern "C" {

int64_t ernie5_permute_cuda_workspace_bytes(int64_t tokens, int64_t num_experts, int64_t top_k) {
  return ceil_div(tokens * top_k, kBlockItems) * num_experts * static_cast<int64_t>(sizeof(int));
}

int ernie5_permute_forward_cuda(const int32_t* experts, int64_t tokens, int64_t num_experts, int64_t top_k,
                                int64_t* counts, int32_t* order, int32_t* offsets, void* workspace, void* stream) {
  if (too_large(tokens, num_experts, top_k)) return static_cast<int>(cudaErrorInvalidValue);
  return run_permute(experts, tokens, num_experts, top_k, counts, order, offsets, workspace, as_stream(stream));
}

int ernie5_route_forward_cuda_f32(const float* logits, const float* bias, const uint8_t* valid, int64_t tokens,
                                  int64_t num_experts, int64_t top_k, int softmax, float scale, int32_t* experts,
                                  float* weights, int64_t* counts, int32_t* order, int32_t* offsets, void* workspace,
                                  void* stream) {
  if (too_large(tokens, num_experts, top_k)) return static_cast<int>(cudaErrorInvalidValue);
  if (tokens > 0) {
    const int64_t row = num_experts * static_cast<int64_t>(sizeof(unsigned));
    const int64_t warps = larger(1, smaller(kMostTokenWarps, kTokenShared / row));
    int code = allow_shared(choose, warps * row);
    if (code != 0) return code;
    choose<<<static_cast<unsigned>(ceil_div(tokens, warps)), static_cast<unsigned>(warps * kWarp),
             static_cast<size_t>(warps * row), as_stream(stream)>>>(
        logits, bias, valid, tokens, static_cast<int>(num_experts), static_cast<int>(top_k), softmax != 0, scale,
        experts, weights);
    code = launched();
    if (code != 0) return code;
  }
  return run_permute(experts, tokens, num_experts, top_k, counts, order, offsets, workspace, as_stream(stream));
}

int ernie5_route_backward_cuda_f32(const float* logits, const int32_t* experts, const float* grad_weights,
                                   int64_t tokens, int64_t num_experts, int64_t top_k, int softmax, float scale,
                                   float* grad_logits, void* stream) {
  if (too_large(tokens, num_experts, top_k)) return static_cast<int>(cudaErrorInvalidValue);
  if (tokens == 0) return 0;
  choose_backward<<<static_cast<unsigned>(ceil_div(tokens, kMostTokenWarps)), kMostTokenWarps * kWarp, 0,
                    as_stream(stream)>>>(logits, experts, grad_weights, tokens, static_cast<int>(num_experts),
                                         static_cast<int>(top_k), softmax != 0, scale, grad_logits);
  return launched();
}

}  // extern "C"
