#include "route/route.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "common/parallel.h"
#include "common/simd.h"

namespace ernie5 {
namespace {

constexpr int64_t kLanes = 16;
constexpr int64_t kTaskScores = 32768;  // some 20 microseconds of work: less is not worth a second thread
constexpr int64_t kPieceAssignments = 16384;
constexpr int64_t kMostLaneTopK = 8;
constexpr int64_t kMostLaneExperts = 1024;
constexpr int64_t kMostInsertedTopK = 64;
constexpr float kSmallestSum = 1e-12f;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

struct Problem {
  const float* logits;
  const float* bias;
  const uint8_t* valid;
  int64_t tokens, num_experts, top_k;
  bool softmax;
  float scale;
  int32_t* experts;
  float* weights;
};

// Scratch of a thread, kept between calls.
struct Scratch {
  std::vector<float> scores;
  std::vector<uint64_t> keys;

  float* floats(int64_t count) {
    if (static_cast<int64_t>(scores.size()) < count) scores.resize(static_cast<size_t>(count));
    return scores.data();
  }
};
Scratch& scratch() {
  static thread_local Scratch mine;
  return mine;
}

f32x16 sigmoid(f32x16 x) { return reciprocal(1.0f + exp_or_nan(-x)); }

// Bit l: lane l of v is above the limit (never so for a NaN).
uint32_t above(f32x16 v, float limit) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(reinterpret_cast<const __m512&>(v), _mm512_set1_ps(limit), _CMP_GT_OQ);
#else
  uint32_t bits = 0;
  for (int l = 0; l < 16; ++l) bits |= static_cast<uint32_t>(v[l] > limit) << l;
  return bits;
#endif
}

// ------------------------------------------------------- sixteen tokens at once

template <int Step>
void exchange(f32x16& a, f32x16& b) {
  // Lane l of the new a is b[l - Step] where l has the bit Step, else a[l]; the new b is its mirror.
  constexpr auto upper = [](int l) { return (l & Step) != 0 ? 16 + l - Step : l; };
  constexpr auto lower = [](int l) { return (l & Step) != 0 ? 16 + l : l + Step; };
  const f32x16 x = a, y = b;
#define LANES(f) f(0), f(1), f(2), f(3), f(4), f(5), f(6), f(7), f(8), f(9), f(10), f(11), f(12), f(13), f(14), f(15)
  a = __builtin_shufflevector(x, y, LANES(upper));
  b = __builtin_shufflevector(x, y, LANES(lower));
#undef LANES
}

template <int Step>
void exchange_all(f32x16 (&rows)[16]) {
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    if ((i & Step) == 0) exchange<Step>(rows[i], rows[i + Step]);
  }
}

void transpose(f32x16 (&rows)[16]) {
  exchange_all<8>(rows);
  exchange_all<4>(rows);
  exchange_all<2>(rows);
  exchange_all<1>(rows);
}

// Logits of up to sixteen tokens as columns [E][16]; lanes past `count` repeat the last token.
void load_columns(const float* logits, int64_t count, int64_t num_experts, float* columns) {
  for (int64_t e = 0; e < num_experts; e += kLanes) {
    const int64_t some = std::min(kLanes, num_experts - e);
    f32x16 rows[16];
#pragma GCC unroll 16
    for (int64_t t = 0; t < kLanes; ++t) {
      const float* row = logits + std::min(t, count - 1) * num_experts + e;
      rows[t] = some == kLanes ? load(row) : load_part(row, some);
      __builtin_prefetch(row + kLanes * num_experts);  // the next sixteen tokens, this column
    }
    transpose(rows);
#pragma GCC unroll 16
    for (int64_t i = 0; i < kLanes; ++i) {
      if (i < some) store(columns + (e + i) * kLanes, rows[i]);
    }
  }
}

void sigmoid_columns(float* columns, int64_t num_experts) {
  for (int64_t e = 0; e < num_experts; ++e) store(columns + e * kLanes, sigmoid(load(columns + e * kLanes)));
}

void softmax_columns(float* columns, int64_t num_experts) {
  f32x16 top = splat(-kInfinity), total{};
  for (int64_t e = 0; e < num_experts; ++e) top = maximum(load(columns + e * kLanes), top);
  for (int64_t e = 0; e < num_experts; ++e) {
    f32x16 power = exp_or_nan(load(columns + e * kLanes) - top);
    total += power;
    store(columns + e * kLanes, power);
  }
  const f32x16 inverse = 1.0f / total;
  for (int64_t e = 0; e < num_experts; ++e) store(columns + e * kLanes, load(columns + e * kLanes) * inverse);
}

// The TopK largest score + bias of every lane, largest first; of equals the lower expert first.
template <int TopK>
void select_lanes(const float* columns, const float* bias, int64_t num_experts, i32x16 (&chosen)[kMostLaneTopK]) {
  // A place that is still empty holds NaN: nothing compares as "at most NaN", so every candidate enters it.
  f32x16 best[TopK];
  i32x16 index[TopK];
  for (int k = 0; k < TopK; ++k) {
    best[k] = splat(kNaN);
    index[k] = i32x16{};
  }
  for (int64_t e = 0; e < num_experts; ++e) {
    f32x16 key = load(columns + e * kLanes) + bias[e];
    key = key == key ? key : splat(-kInfinity);
    const i32x16 expert = i32x16{} + static_cast<int32_t>(e);
    // From the last place up, so that every place still finds its neighbour's old value.
#pragma GCC unroll 8
    for (int k = TopK - 1; k > 0; --k) {
      const f32x16 moved = key <= best[k - 1] ? key : best[k - 1];
      const i32x16 moved_index = key <= best[k - 1] ? expert : index[k - 1];
      index[k] = key <= best[k] ? index[k] : moved_index;
      best[k] = key <= best[k] ? best[k] : moved;
    }
    index[0] = key <= best[0] ? index[0] : expert;
    best[0] = key <= best[0] ? best[0] : key;
  }
  for (int k = 0; k < TopK; ++k) chosen[k] = index[k];
}

using SelectLanes = void (*)(const float*, const float*, int64_t, i32x16 (&)[kMostLaneTopK]);
constexpr SelectLanes kSelectLanes[] = {select_lanes<1>, select_lanes<2>, select_lanes<3>, select_lanes<4>,
                                        select_lanes<5>, select_lanes<6>, select_lanes<7>, select_lanes<8>};

// One token's weights from the scores of its experts, in place.
void normalise(float* weights, int64_t top_k, float scale) {
  float total = 0.0f;
  for (int64_t k = 0; k < top_k; ++k) total += weights[k];
  const float factor = scale / (total < kSmallestSum ? kSmallestSum : total);
  for (int64_t k = 0; k < top_k; ++k) weights[k] *= factor;
}

void not_routed(const Problem& p, int64_t token) {
  std::fill_n(p.experts + token * p.top_k, p.top_k, -1);
  std::fill_n(p.weights + token * p.top_k, p.top_k, 0.0f);
}

// weights [K][16] of the scores [K][16] in place: what normalise does, for sixteen tokens.
void normalise_lanes(float* weights, int64_t top_k, float scale) {
  f32x16 total{};
  for (int64_t k = 0; k < top_k; ++k) total += load(weights + k * kLanes);
  total = total < kSmallestSum ? splat(kSmallestSum) : total;
  const f32x16 factor = scale / total;
  for (int64_t k = 0; k < top_k; ++k) store(weights + k * kLanes, load(weights + k * kLanes) * factor);
}

void route_sixteen(const Problem& p, int64_t first, int64_t count) {
  float* columns = scratch().floats(p.num_experts * kLanes);
  load_columns(p.logits + first * p.num_experts, count, p.num_experts, columns);
  (p.softmax ? softmax_columns : sigmoid_columns)(columns, p.num_experts);
  i32x16 chosen[kMostLaneTopK];
  kSelectLanes[p.top_k - 1](columns, p.bias, p.num_experts, chosen);
  int32_t experts[kMostLaneTopK * kLanes];
  float weights[kMostLaneTopK * kLanes];
  std::memcpy(experts, chosen, sizeof experts);
  for (int64_t i = 0; i < p.top_k * kLanes; ++i) weights[i] = columns[experts[i] * kLanes + i % kLanes];
  normalise_lanes(weights, p.top_k, p.scale);
  for (int64_t lane = 0; lane < count; ++lane) {
    const int64_t token = first + lane;
    if (p.valid[token] == 0) {
      not_routed(p, token);
      continue;
    }
    for (int64_t k = 0; k < p.top_k; ++k) {
      p.experts[token * p.top_k + k] = experts[k * kLanes + lane];
      p.weights[token * p.top_k + k] = weights[k * kLanes + lane];
    }
  }
}

// ------------------------------------------------------- one token at a time: many experts, or a large K

void row_scores(const float* logits, int64_t num_experts, bool softmax, float* scores) {
  if (!softmax) {
    each16(num_experts, [&](int64_t e, int some) __attribute__((always_inline)) {
      store_some(scores + e, sigmoid(load_some(logits + e, some)), some);
    });
    return;
  }
  f32x16 tops = splat(-kInfinity), totals{};
  each16(num_experts, [&](int64_t e, int some) __attribute__((always_inline)) {
    tops = maximum(load_some(logits + e, some, -kInfinity), tops);
  });
  const float top = largest(tops);
  each16(num_experts, [&](int64_t e, int some) __attribute__((always_inline)) {
    f32x16 power = exp_or_nan(load_some(logits + e, some, -kInfinity) - top);
    totals += power;
    store_some(scores + e, power, some);
  });
  const float total = sum(totals);
  each16(num_experts, [&](int64_t e, int some) __attribute__((always_inline)) {
    store_some(scores + e, load_some(scores + e, some) / total, some);
  });
}

// Keeps the top_k best (key, expert) of the candidates offered in order of expert.
class Insertion {
 public:
  // Puts the candidate before the first lower key; the last place falls out if all are taken.
  void insert(float key, int32_t expert, int64_t taken) {
    int64_t place = taken;
    for (; place > 0 && best_[place - 1] < key; --place) {
      best_[place] = best_[place - 1];
      index_[place] = index_[place - 1];
    }
    best_[place] = key;
    index_[place] = expert;
  }
  float at(int64_t place) const { return best_[place]; }
  const int32_t* index() const { return index_; }

 private:
  float best_[kMostInsertedTopK];
  int32_t index_[kMostInsertedTopK];
};

void select_by_insertion(const float* scores, const float* bias, int64_t num_experts, int64_t top_k,
                         int32_t* experts) {
  Insertion chosen;
  for (int64_t e = 0; e < top_k; ++e) {
    const float key = scores[e] + bias[e];
    chosen.insert(key == key ? key : -kInfinity, static_cast<int32_t>(e), e);
  }
  each16(num_experts - top_k, [&](int64_t at, int some) __attribute__((always_inline)) {
    const int64_t e = top_k + at;
    const f32x16 key = load_some(scores + e, some) + load_some(bias + e, some);
    uint32_t candidates = above(key, chosen.at(top_k - 1)) & ((1u << some) - 1);
    if (candidates == 0) return;
    float keys[kLanes];
    store(keys, key);
    for (; candidates != 0; candidates &= candidates - 1) {
      const int lane = __builtin_ctz(candidates);
      if (keys[lane] > chosen.at(top_k - 1)) chosen.insert(keys[lane], static_cast<int32_t>(e) + lane, top_k - 1);
    }
  });
  std::memcpy(experts, chosen.index(), static_cast<size_t>(top_k) * sizeof(int32_t));
}

// A number that sorts as (key, lower expert first) does.
uint64_t sortable(float key, int64_t expert) {
  key = key == key ? key + 0.0f : -kInfinity;  // + 0 makes one zero of two
  uint32_t bits;
  std::memcpy(&bits, &key, sizeof bits);
  bits = (bits >> 31) != 0 ? ~bits : bits | 0x80000000u;
  return static_cast<uint64_t>(bits) << 32 | (0xffffffffu - static_cast<uint32_t>(expert));
}

void select_by_sorting(const float* scores, const float* bias, int64_t num_experts, int64_t top_k, int32_t* experts) {
  auto& keys = scratch().keys;
  keys.resize(static_cast<size_t>(num_experts));
  for (int64_t e = 0; e < num_experts; ++e) keys[static_cast<size_t>(e)] = sortable(scores[e] + bias[e], e);
  std::partial_sort(keys.begin(), keys.begin() + top_k, keys.end(), std::greater<uint64_t>());
  for (int64_t k = 0; k < top_k; ++k) {
    experts[k] = static_cast<int32_t>(0xffffffffu - static_cast<uint32_t>(keys[static_cast<size_t>(k)]));
  }
}

void route_one(const Problem& p, int64_t token) {
  if (p.valid[token] == 0) return not_routed(p, token);
  float* scores = scratch().floats(p.num_experts);
  row_scores(p.logits + token * p.num_experts, p.num_experts, p.softmax, scores);
  int32_t* experts = p.experts + token * p.top_k;
  float* weights = p.weights + token * p.top_k;
  auto select = p.top_k <= kMostInsertedTopK ? select_by_insertion : select_by_sorting;
  select(scores, p.bias, p.num_experts, p.top_k, experts);
  for (int64_t k = 0; k < p.top_k; ++k) weights[k] = scores[experts[k]];
  normalise(weights, p.top_k, p.scale);
}

void route_all(const Problem& p) {
  const bool lanes = p.top_k <= kMostLaneTopK && p.num_experts <= kMostLaneExperts;
  const int64_t each = (kTaskScores / p.num_experts + kLanes) / kLanes * kLanes;
  parallel_for((p.tokens + each - 1) / each, [&](int64_t task, int) {
    const int64_t end = std::min(p.tokens, (task + 1) * each);
    for (int64_t t = task * each; t < end; t += lanes ? kLanes : 1) {
      lanes ? route_sixteen(p, t, std::min(kLanes, end - t)) : route_one(p, t);
    }
  });
}

// ------------------------------------------------------- permutation: a counting sort

bool routed(int32_t expert, int64_t num_experts) {
  return static_cast<uint32_t>(expert) < static_cast<uint32_t>(num_experts);
}

// Contiguous pieces of the assignments; each is counted by itself, so that all can be placed at once.
struct Pieces {
  explicit Pieces(int64_t assignments) : total(assignments) {
    count = std::max<int64_t>(1, std::min<int64_t>(num_threads(), assignments / kPieceAssignments));
    each = (assignments + count - 1) / count;
  }
  template <class Body>
  void run(Body&& body) const {
    on_threads(static_cast<int>(count),
               [&](int piece) { body(piece, std::min(total, piece * each), std::min(total, (piece + 1) * each)); });
  }
  int64_t total, count, each;
};

void count_piece(const int32_t* experts, int64_t begin, int64_t end, int64_t num_experts, int32_t* counts) {
  std::fill_n(counts, num_experts, 0);
  for (int64_t a = begin; a < end; ++a) {
    if (routed(experts[a], num_experts)) ++counts[experts[a]];
  }
}

// Pieces' counts [pieces][E] -> where each piece's assignments of an expert begin, in place; counts and offsets of all.
void counts_to_places(int64_t pieces, int64_t num_experts, int32_t* places, int64_t* counts, int32_t* offsets) {
  int32_t running = 0;
  for (int64_t e = 0; e < num_experts; ++e) {
    offsets[e] = running;
    for (int64_t piece = 0; piece < pieces; ++piece) {
      const int32_t here = places[piece * num_experts + e];
      places[piece * num_experts + e] = running;
      running += here;
    }
    counts[e] = running - offsets[e];
  }
  offsets[num_experts] = running;
}

void place_piece(const int32_t* experts, int64_t begin, int64_t end, int64_t num_experts, int32_t* places,
                 int32_t* order) {
  for (int64_t a = begin; a < end; ++a) {
    if (routed(experts[a], num_experts)) order[places[experts[a]]++] = static_cast<int32_t>(a);
  }
}

void permute(const int32_t* experts, int64_t assignments, int64_t num_experts, int64_t* counts, int32_t* order,
             int32_t* offsets) {
  const Pieces pieces(assignments);
  static thread_local std::vector<int32_t> kept;
  kept.resize(static_cast<size_t>(pieces.count * num_experts));
  int32_t* places = kept.data();
  pieces.run([&](int64_t piece, int64_t begin, int64_t end) {
    count_piece(experts, begin, end, num_experts, places + piece * num_experts);
  });
  counts_to_places(pieces.count, num_experts, places, counts, offsets);
  pieces.run([&](int64_t piece, int64_t begin, int64_t end) {
    place_piece(experts, begin, end, num_experts, places + piece * num_experts, order);
  });
  std::fill(order + offsets[num_experts], order + assignments, -1);
}

// ------------------------------------------------------- gradient

// Gradient of the K scores of a token, in place of `grad`: weights = scale * score / max(sum of scores, smallest).
void backward_normalise(const float* scores, int64_t top_k, float scale, float* grad) {
  float total = 0.0f, along = 0.0f;
  for (int64_t k = 0; k < top_k; ++k) {
    total += scores[k];
    along += scores[k] * grad[k];
  }
  const bool clipped = total < kSmallestSum;
  const float inverse = 1.0f / (clipped ? kSmallestSum : total);
  const float shift = clipped ? 0.0f : along * inverse;
  for (int64_t k = 0; k < top_k; ++k) grad[k] = (grad[k] - shift) * inverse * scale;
}

struct Gradient {
  const float* logits;
  const int32_t* experts;
  const float* grad_weights;
  int64_t num_experts, top_k;
  float scale;
  float* grad_logits;
};

// Tokens [begin, end): the sigmoids of all their assignments at once, then token by token.
void backward_sigmoid(const Gradient& g, int64_t begin, int64_t end) {
  const int64_t count = (end - begin) * g.top_k;
  float* scores = scratch().floats(2 * count);
  float* grad = scores + count;
  std::copy_n(g.grad_weights + begin * g.top_k, count, grad);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t a = begin * g.top_k + i;
    scores[i] = g.experts[a] < 0 ? 0.0f : g.logits[a / g.top_k * g.num_experts + g.experts[a]];
  }
  each16(count, [&](int64_t i, int some) __attribute__((always_inline)) {
    store_some(scores + i, sigmoid(load_some(scores + i, some)), some);
  });
  std::fill(g.grad_logits + begin * g.num_experts, g.grad_logits + end * g.num_experts, 0.0f);
  for (int64_t t = begin; t < end; ++t, scores += g.top_k, grad += g.top_k) {
    const int32_t* experts = g.experts + t * g.top_k;
    if (experts[0] < 0) continue;
    backward_normalise(scores, g.top_k, g.scale, grad);
    float* out = g.grad_logits + t * g.num_experts;
    for (int64_t k = 0; k < g.top_k; ++k) out[experts[k]] = grad[k] * scores[k] * (1.0f - scores[k]);
  }
}

void backward_softmax(const Gradient& g, int64_t token) {
  float* out = g.grad_logits + token * g.num_experts;
  const int32_t* experts = g.experts + token * g.top_k;
  if (experts[0] < 0) {
    std::fill_n(out, g.num_experts, 0.0f);
    return;
  }
  float* scores = scratch().floats(2 * g.top_k);
  float* grad = scores + g.top_k;
  row_scores(g.logits + token * g.num_experts, g.num_experts, true, out);
  for (int64_t k = 0; k < g.top_k; ++k) scores[k] = out[experts[k]];
  std::copy_n(g.grad_weights + token * g.top_k, g.top_k, grad);
  backward_normalise(scores, g.top_k, g.scale, grad);
  float along = 0.0f;
  for (int64_t k = 0; k < g.top_k; ++k) along += grad[k] * scores[k];
  each16(g.num_experts, [&](int64_t e, int some) __attribute__((always_inline)) {
    store_some(out + e, load_some(out + e, some) * -along, some);
  });
  for (int64_t k = 0; k < g.top_k; ++k) out[experts[k]] += grad[k] * scores[k];
}

void backward(const Gradient& g, int64_t tokens, bool softmax) {
  const int64_t each = std::max<int64_t>(1, kTaskScores / g.num_experts);
  parallel_for((tokens + each - 1) / each, [&](int64_t task, int) {
    const int64_t begin = task * each, end = std::min(tokens, begin + each);
    if (!softmax) return backward_sigmoid(g, begin, end);
    for (int64_t t = begin; t < end; ++t) backward_softmax(g, t);
  });
}

}  // namespace
}  // namespace ernie5

extern "C" {

void ernie5_route_forward_cpu_f32(const float* logits, const float* bias, const uint8_t* valid, int64_t tokens,
                                  int64_t num_experts, int64_t top_k, int softmax, float scale, int32_t* experts,
                                  float* weights, int64_t* counts, int32_t* order, int32_t* offsets) {
  ernie5::route_all({logits, bias, valid, tokens, num_experts, top_k, softmax != 0, scale, experts, weights});
  ernie5::permute(experts, tokens * top_k, num_experts, counts, order, offsets);
}

void ernie5_route_backward_cpu_f32(const float* logits, const int32_t* experts, const float* grad_weights,
                                   int64_t tokens, int64_t num_experts, int64_t top_k, int softmax, float scale,
                                   float* grad_logits) {
  ernie5::backward({logits, experts, grad_weights, num_experts, top_k, scale, grad_logits}, tokens, softmax != 0);
}

void ernie5_permute_forward_cpu(const int32_t* experts, int64_t tokens, int64_t num_experts, int64_t top_k,
                                int64_t* counts, int32_t* order, int32_t* offsets) {
  ernie5::permute(experts, tokens * top_k, num_experts, counts, order, offsets);
}

}  // extern "C"
