// One token out of a row of logits. The meaning is that of ernie5/generation/sampling.py.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>

#include "common/simd.h"

namespace ernie5 {

constexpr int64_t kNever = 255;  // of `missing`: no tokens complete the text

struct Sampling {
  double temperature;  // 0: the most likely
  int64_t top_k;       // 0: all
  double top_p;        // 1: all
};

// The first of the largest logits that are allowed, missing[v] <= limit; -1 where none is. A NaN is the largest.
inline int64_t most_likely(const float* logits, const uint8_t* missing, int limit, int64_t width) {
  int64_t best = -1;
  float highest = -INFINITY;
  for (int64_t start = 0; start < width; start += 64) {
    int64_t stop = std::min(start + 64, width);
    float found = -INFINITY;
    bool other = false;
    for (int64_t v = start; v < stop; ++v) {
      float value = missing[v] <= limit ? logits[v] : -INFINITY;
      other |= value != value;
      found = value > found ? value : found;
    }
    if (!other && best >= 0 && found <= highest) continue;
    for (int64_t v = start; v < stop; ++v) {
      if (missing[v] > limit) continue;
      if (logits[v] != logits[v]) return v;
      if (best >= 0 && logits[v] <= highest) continue;
      best = v;
      highest = logits[v];
    }
  }
  return best;
}

// e^((logit - largest) / temperature), 0 where not allowed, into weights [width]; returns their sum.
inline double weigh(const float* logits, const uint8_t* missing, int limit, int64_t width, float highest,
                    double temperature, float* weights) {
  float factor = static_cast<float>(1.0 / temperature);
  double total = 0.0;
  each16(width, [&](int64_t v, int count) {
    f32x16 power = (load_some(logits + v, count) - highest) * factor, value = exp(power);
    for (int i = 0; i < count; ++i) value[i] = missing[v + i] <= limit ? value[i] : 0.0f;
    store_some(weights + v, value, count);
    for (int i = count; i < 16; ++i) value[i] = 0.0f;
    total += sum(value);
  });
  return total;
}

// Sets all weights to 0 but the top_k largest, of these the fewest that reach top_p of the total; of equals at the
// border the first stay. Returns what is left of the total. `sorted` [width] is memory to work in.
inline double cut(float* weights, int64_t width, const Sampling& sampling, double total, float* sorted) {
  int64_t positive = 0;
  for (int64_t v = 0; v < width; ++v) {
    sorted[positive] = weights[v];
    positive += weights[v] > 0.0f;
  }
  int64_t most = sampling.top_k > 0 ? std::min(sampling.top_k, positive) : positive, count = 0;
  double before = 0.0, enough = sampling.top_p < 1.0 ? sampling.top_p * total : INFINITY;
  for (int64_t ready = 0; count < most && before < enough;) {  // mostly a few weights decide: sort no more of them
    int64_t stop = std::min(std::max<int64_t>(64, 8 * ready), most);
    if (stop < positive) std::nth_element(sorted + ready, sorted + stop, sorted + positive, std::greater<float>());
    std::sort(sorted + ready, sorted + stop, std::greater<float>());
    for (ready = stop; count < stop && before < enough; ++count) before += sorted[count];
  }
  if (count == 0) return total;
  float border = sorted[count - 1];
  int64_t equals = sorted + count - std::lower_bound(sorted, sorted + count, border, std::greater<float>());
  double left = 0.0;
  for (int64_t v = 0; v < width; ++v) {
    bool keep = weights[v] > border || (weights[v] == border && equals-- > 0);
    weights[v] = keep ? weights[v] : 0.0f;
    left += weights[v];
  }
  return left;
}

// The chosen token, missing[.] <= limit; -1 where none may follow. `uniform` in [0, 1) decides, unless temperature is 0;
// memory [2 * width].
inline int64_t choose(const float* logits, const uint8_t* missing, int limit, int64_t width, const Sampling& sampling,
                      double uniform, float* memory) {
  int64_t best = most_likely(logits, missing, limit, width);
  if (best < 0 || sampling.temperature == 0.0) return best;
  double total = weigh(logits, missing, limit, width, logits[best], sampling.temperature, memory);
  if (sampling.top_k > 0 || sampling.top_p < 1.0) total = cut(memory, width, sampling, total, memory + width);
  double reached = 0.0;
  for (int64_t v = 0; v < width; ++v) {
    if (!(memory[v] > 0.0f)) continue;
    best = v;
    reached += memory[v];
    if (reached >= uniform * total) break;
  }
  return best;
}

}  // namespace ernie5
