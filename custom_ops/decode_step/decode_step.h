// One decoding step: some layers of the backbone over the few new rows of every sequence, keys and values of the
// earlier rows kept in a cache that is written in place.
//
// Shapes: B sequences, n new rows of each, T = B*n, D hidden, N query heads, G key/value heads, h head_dim, E experts,
// K experts per token, F expert width, H shared expert's width, V vocabulary, L layers, C capacity of the cache.
#pragma once

#include <cstdint>

namespace ernie5 {

// `model` is int64: kModelHeader values, then kLayerPointers addresses for each layer. Matrices are float or bfloat16
// (kHalfWeights), row-major; norms, router, bias and frequencies are always float. eps and scale are the bits of a
// double. An absent shared expert has H = 0.
enum ModelHeader : int {
  kHalfWeights,  // 1: matrices are bfloat16
  kLayers,
  kHidden,
  kHeads,
  kGroups,
  kHeadDim,
  kExperts,
  kTopK,
  kWidth,
  kSharedWidth,
  kVocabulary,
  kSoftmax,  // 1: router scores by softmax, else sigmoid
  kEpsBits,
  kScaleBits,    // the K weights of a token sum to this
  kFrequencies,  // [3, h/2]: turn of each pair per unit of position t, h, w
  kFinalNorm,    // [D]
  kEmbedding,    // [V, D], token embedding and output head
  kModelHeader
};
enum LayerPointer : int {
  kAttentionNorm,  // [D]
  kQuery,          // [D, N h]
  kKey,            // [D, G h]
  kValue,          // [D, G h]
  kOut,            // [N h, D]
  kMoeNorm,        // [D]
  kRouter,         // [D, E]
  kBias,           // [E], moves the selection only
  kGateUp,         // [E, D, 2F], gate first
  kDown,           // [E, F, D]
  kSharedGateUp,   // [D, 2H]
  kSharedDown,     // [H, D]
  kLayerPointers
};
// `cache` is int64: batch, capacity, then for each layer the addresses of float k and v [batch, C, G, h].
enum CacheHeader : int { kCacheBatch, kCapacity, kCacheHeader };

}  // namespace ernie5

extern "C" {

// Layers first .. last-1 over rows query_start .. query_start+n-1.
//   hidden [B,n,D], or null: the rows of the embedding that `ids` [B,n] name
//   positions [B,n,3]; valid uint8 [B,n], 0 = padding: passes through no routed expert. From one sequence to the next
//   ids, positions and valid go on `stride` rows later, so they may be windows of longer arrays
//   intervals int32 [B,columns,4] with columns >= query_start+n (later ones are not read)
//   out [B,n,D]: state after layer last-1; logits [B,V] or null: final norm and head of each sequence's last row
// Writes rows query_start .. of the cache of these layers; rows before them must be there. Needs query_start+n <= C.
// Returns 0, or 1 when there was no memory.
int ernie5_decode_step_forward_cpu(const int64_t* model, const int64_t* cache, const float* hidden, const int64_t* ids,
                                   const float* positions, const int32_t* intervals, int64_t columns,
                                   const uint8_t* valid, int64_t batch, int64_t rows, int64_t stride,
                                   int64_t query_start, int64_t first, int64_t last, float* out, float* logits);
}
