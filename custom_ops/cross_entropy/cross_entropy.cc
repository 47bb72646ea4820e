#include "cross_entropy/cross_entropy.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "common/parallel.h"
#include "common/simd.h"

namespace ernie5 {
namespace {

constexpr int64_t kIgnored = -100;
constexpr int64_t kTaskElements = 65536;  // some 20 microseconds of work: less is not worth a second thread
constexpr float kSlack = 16.0f;          // e^16 times the classes stays far from overflow
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// Sum of e^x over what was seen of a row, as total * e^shift, lane by lane. A value may exceed the shift by kSlack
// before it moves: that is rare, so a row is read once and the exponentials overlap with the memory's latency.
struct Exponentials {
  float shift = -kInfinity;
  f32x16 total{};

  // Makes room for values up to `top`.
  void reach(float top) {
    if (!(top > shift + kSlack)) return;
    total *= std::exp(shift - top);
    shift = top;
  }
  // `base` is the shift, or 0 while there is none: only -infinity (and NaN, which stays one) was seen then.
  void add(f32x16 value) {
    const float base = shift > -kInfinity ? shift : 0.0f;
    total += exp_or_nan(value - base);
  }
};

template <class T>
float log_sum_exp(const T* x, int64_t classes) {
  Exponentials sums;
  int64_t c = 0;
  for (; c + 64 <= classes; c += 64) {
    f32x16 v[4];
    for (int i = 0; i < 4; ++i) v[i] = load(x + c + 16 * i);
    sums.reach(largest(maximum(maximum(v[0], v[1]), maximum(v[2], v[3]))));
    for (int i = 0; i < 4; ++i) sums.add(v[i]);
  }
  each16(classes - c, [&](int64_t at, int some) __attribute__((always_inline)) {
    f32x16 value = load_some(x + c + at, some, -kInfinity);
    sums.reach(largest(maximum(value, splat(-kInfinity))));
    sums.add(value);
  });
  const float total = sum(sums.total);
  if (sums.shift > -kInfinity) return sums.shift + std::log(total);
  return total == 0.0f ? -kInfinity : kNaN;
}

template <class Body>
void over_rows(int64_t rows, int64_t columns, Body&& body) {
  int64_t each = std::max<int64_t>(1, kTaskElements / std::max<int64_t>(columns, 1));
  parallel_for((rows + each - 1) / each, [&](int64_t task, int) {
    for (int64_t r = task * each, end = std::min(rows, r + each); r < end; ++r) body(r);
  });
}

template <class T>
void forward(const T* logits, const int64_t* labels, int64_t rows, int64_t classes, float* loss, float* lse) {
  over_rows(rows, classes, [&](int64_t r) {
    const T* row = logits + r * classes;
    lse[r] = log_sum_exp(row, classes);
    if (labels[r] == kIgnored) {
      loss[r] = 0.0f;
    } else if (labels[r] < 0 || labels[r] >= classes) {
      loss[r] = kNaN;
    } else {
      loss[r] = lse[r] - to_float(row[labels[r]]);
    }
  });
}

template <class T>
void fill(T* row, int64_t count, float value) {
  each16(count, [&](int64_t c, int some) __attribute__((always_inline)) { store_some(row + c, splat(value), some); });
}

inline void set(float* p, float value) { *p = value; }
inline void set(bf16* p, float value) { store_part(p, splat(value), 1); }

template <class T>
void backward(const T* logits, const int64_t* labels, const float* lse, const float* grad_loss, int64_t rows,
              int64_t classes, T* grad_logits) {
  over_rows(rows, classes, [&](int64_t r) {
    const T* row = logits + r * classes;
    T* out = grad_logits + r * classes;
    int64_t label = labels[r];
    if (label == kIgnored) return fill(out, classes, 0.0f);
    if (label < 0 || label >= classes || !std::isfinite(lse[r])) return fill(out, classes, kNaN);
    const float shift = lse[r], factor = grad_loss[r];
    const float at_label = std::exp(to_float(row[label]) - shift) - 1.0f;  // before out, which may be row, is written
    each16(classes, [&](int64_t c, int some) __attribute__((always_inline)) {
      store_some(out + c, exp_or_nan(load_some(row + c, some) - shift) * factor, some);
    });
    set(out + label, at_label * factor);
  });
}

inline const bf16* typed(const uint16_t* p) { return reinterpret_cast<const bf16*>(p); }
inline bf16* typed(uint16_t* p) { return reinterpret_cast<bf16*>(p); }

}  // namespace
}  // namespace ernie5

extern "C" {

void ernie5_cross_entropy_forward_cpu_f32(const float* logits, const int64_t* labels, int64_t rows, int64_t classes,
                                          float* loss, float* lse) {
  ernie5::forward(logits, labels, rows, classes, loss, lse);
}

void ernie5_cross_entropy_forward_cpu_bf16(const uint16_t* logits, const int64_t* labels, int64_t rows,
                                           int64_t classes, float* loss, float* lse) {
  ernie5::forward(ernie5::typed(logits), labels, rows, classes, loss, lse);
}

void ernie5_cross_entropy_backward_cpu_f32(const float* logits, const int64_t* labels, const float* lse,
                                           const float* grad_loss, int64_t rows, int64_t classes, float* grad_logits) {
  ernie5::backward(logits, labels, lse, grad_loss, rows, classes, grad_logits);
}

void ernie5_cross_entropy_backward_cpu_bf16(const uint16_t* logits, const int64_t* labels, const float* lse,
                                            const float* grad_loss, int64_t rows, int64_t classes,
                                            uint16_t* grad_logits) {
  ernie5::backward(ernie5::typed(logits), labels, lse, grad_loss, rows, classes, ernie5::typed(grad_logits));
}

}  // extern "C"
