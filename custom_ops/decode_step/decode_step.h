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
//   out [B,n,D]: state after layer last-1; logits [B,V] or null: final norm and head of each sequence's last row. With
//   logits, only the last row of each sequence is in that state: of the others the last layer's keys and values are made
// Writes rows query_start .. of the cache of these layers; rows before them must be there. Needs query_start+n <= C.
// Returns 0, or 1 when there was no memory.
int ernie5_decode_step_forward_cpu(const int64_t* model, const int64_t* cache, const float* hidden, const int64_t* ids,
                                   const float* positions, const int32_t* intervals, int64_t columns,
                                   const uint8_t* valid, int64_t batch, int64_t rows, int64_t stride,
                                   int64_t query_start, int64_t first, int64_t last, float* out, float* logits);

// Up to `count` tokens of text after each sequence: row query_start goes through all layers, the next token is chosen
// from its logits, is the next row, and so on, until every sequence has ended.
//   cache, positions, intervals, columns, valid, stride as above, from row query_start on
//   ids [B]: the tokens of the first row; overwritten. A sequence whose token is `end` has ended: `end` follows
//   following, missing uint8 [4,W]: the state after each token in each of the 4 states of a text, and how many more
//   tokens complete the text then, 255 = none do. W <= V; other tokens are never chosen
//   left: tokens that may follow the first chosen one; a token must be completed by as many as are left
//   temperature 0: the most likely, of equals the first. Else, out of the `top_k` (0 = all) likeliest and the fewest that
//   reach the share `top_p`, by uniforms double [B,count] in [0, 1)
//   states int64 [B]: of each text, in and out; chosen int64 [B,count]; written [1]: how many of its columns are filled
//   out [B,D] and logits [B,V]: memory to work in
// Returns 0, or 1 when there was no memory.
int ernie5_decode_text_cpu(const int64_t* model, const int64_t* cache, int64_t* ids, const float* positions,
                           const int32_t* intervals, int64_t columns, const uint8_t* valid, int64_t batch,
                           int64_t stride, int64_t query_start, int64_t count, const uint8_t* following,
                           const uint8_t* missing, int64_t width, int64_t end, int64_t left, double temperature,
                           int64_t top_k, double top_p, const double* uniforms, int64_t* states, int64_t* chosen,
                           float* out, float* logits, int64_t* written);
}
