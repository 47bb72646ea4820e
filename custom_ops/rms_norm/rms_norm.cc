#include "rms_norm/rms_norm.h"

#include <algorithm>
#include <cmath>

#include "common/parallel.h"
#include "common/simd.h"

namespace ernie5 {
namespace {

constexpr int64_t kTaskElements = 131072;  // some 20 microseconds of work: less is not worth a second thread
constexpr int64_t kMostBlocks = 256;        // partial sums of the weight's gradient
constexpr int64_t kLeastBlockRows = 32;

// What comes back after a store: kernels go on with the value that others will read.
inline f32x16 as_stored(const float*, f32x16 v) { return v; }
inline f32x16 as_stored(const bf16*, f32x16 v) { return widen(narrow(v)); }

template <class T>
float mean_square(const T* x, const T* residual, int64_t columns, T* sum_out) {
  f32x16 total{};
  each16(columns, [&](int64_t c, int count) __attribute__((always_inline)) {
    f32x16 s = load_some(x + c, count);
    if (residual != nullptr) {
      s = as_stored(x, s + load_some(residual + c, count));
      store_some(sum_out + c, s, count);
    }
    total += s * s;
  });
  return sum(total) / static_cast<float>(columns);
}

template <class T>
void forward(const T* x, const T* residual, const T* weight, int64_t rows, int64_t columns, float eps, T* y,
             T* sum_out, float* inverse) {
  int64_t each = std::max<int64_t>(1, kTaskElements / std::max<int64_t>(columns, 1));
  parallel_for((rows + each - 1) / each, [&](int64_t task, int) {
    for (int64_t r = task * each, end = std::min(rows, r + each); r < end; ++r) {
      const T* s = x + r * columns;
      T* kept = residual != nullptr ? sum_out + r * columns : nullptr;
      float scale =
          1.0f / std::sqrt(mean_square(s, residual != nullptr ? residual + r * columns : nullptr, columns, kept) + eps);
      inverse[r] = scale;
      if (kept != nullptr) s = kept;
      T* out = y + r * columns;
      each16(columns, [&](int64_t c, int count) __attribute__((always_inline)) {
        store_some(out + c, load_some(s + c, count) * scale * load_some(weight + c, count), count);
      });
    }
  });
}

int64_t block_rows(int64_t rows) { return std::max(kLeastBlockRows, (rows + kMostBlocks - 1) / kMostBlocks); }
int64_t block_count(int64_t rows) { return (rows + block_rows(rows) - 1) / block_rows(rows); }

// grad_s of one row; adds the row's share of the weight's gradient to `partial`.
template <class T>
void backward_row(const T* s, const T* weight, float inverse, const T* grad_y, const T* grad_sum, int64_t columns,
                  T* grad_s, T* grad_residual, float* partial) {
  f32x16 dots{};
  each16(columns, [&](int64_t c, int count) __attribute__((always_inline)) {
    dots += load_some(grad_y + c, count) * load_some(weight + c, count) * load_some(s + c, count);
  });
  float along = sum(dots) * inverse * inverse / static_cast<float>(columns);
  each16(columns, [&](int64_t c, int count) __attribute__((always_inline)) {
    f32x16 value = load_some(s + c, count), grad = load_some(grad_y + c, count);
    store_some(partial + c, load_some(partial + c, count) + grad * (value * inverse), count);
    f32x16 result = (grad * load_some(weight + c, count) - value * along) * inverse;
    if (grad_sum != nullptr) result += load_some(grad_sum + c, count);
    store_some(grad_s + c, result, count);
    if (grad_residual != nullptr) store_some(grad_residual + c, result, count);
  });
}

template <class T>
void reduce_blocks(const float* partial, int64_t blocks, int64_t columns, T* grad_weight) {
  parallel_range(columns, std::max<int64_t>(16, kTaskElements / std::max<int64_t>(blocks, 1)), 16,
                 [&](int64_t begin, int64_t end, int) {
                   each16(end - begin, [&](int64_t c, int count) __attribute__((always_inline)) {
                     f32x16 total{};
                     for (int64_t b = 0; b < blocks; ++b) total += load_some(partial + b * columns + begin + c, count);
                     store_some(grad_weight + begin + c, total, count);
                   });
                 });
}

template <class T>
void backward(const T* s, const T* weight, const float* inverse, const T* grad_y, const T* grad_sum, int64_t rows,
              int64_t columns, T* grad_s, T* grad_residual, T* grad_weight, float* partial) {
  const int64_t each = block_rows(rows), blocks = block_count(rows);
  auto some = [](auto* p, int64_t offset) { return p != nullptr ? p + offset : nullptr; };
  int64_t grain = std::max<int64_t>(1, kTaskElements / std::max<int64_t>(each * columns, 1));
  parallel_for((blocks + grain - 1) / grain, [&](int64_t task, int) {
    for (int64_t b = task * grain; b < std::min(blocks, (task + 1) * grain); ++b) {
      float* mine = partial + b * columns;
      std::fill(mine, mine + columns, 0.0f);
      for (int64_t r = b * each; r < std::min(rows, (b + 1) * each); ++r) {
        int64_t at = r * columns;
        backward_row(s + at, weight, inverse[r], grad_y + at, some(grad_sum, at), columns, grad_s + at,
                     some(grad_residual, at), mine);
      }
    }
  });
  reduce_blocks(partial, blocks, columns, grad_weight);
}

inline const bf16* typed(const uint16_t* p) { return reinterpret_cast<const bf16*>(p); }
inline bf16* typed(uint16_t* p) { return reinterpret_cast<bf16*>(p); }

}  // namespace
}  // namespace ernie5

extern "C" {

void ernie5_rms_norm_forward_cpu_f32(const float* x, const float* residual, const float* weight, int64_t rows,
                                     int64_t columns, float eps, float* y, float* sum, float* inverse) {
  ernie5::forward(x, residual, weight, rows, columns, eps, y, sum, inverse);
}

void ernie5_rms_norm_forward_cpu_bf16(const uint16_t* x, const uint16_t* residual, const uint16_t* weight,
                                      int64_t rows, int64_t columns, float eps, uint16_t* y, uint16_t* sum,
                                      float* inverse) {
  using ernie5::typed;
  ernie5::forward(typed(x), typed(residual), typed(weight), rows, columns, eps, typed(y), typed(sum), inverse);
}

int64_t ernie5_rms_norm_partial_size(int64_t rows, int64_t columns) { return ernie5::block_count(rows) * columns; }

void ernie5_rms_norm_backward_cpu_f32(const float* s, const float* weight, const float* inverse, const float* grad_y,
                                      const float* grad_sum, int64_t rows, int64_t columns, float* grad_s,
                                      float* grad_residual, float* grad_weight, float* partial) {
  ernie5::backward(s, weight, inverse, grad_y, grad_sum, rows, columns, grad_s, grad_residual, grad_weight, partial);
}

void ernie5_rms_norm_backward_cpu_bf16(const uint16_t* s, const uint16_t* weight, const float* inverse,
                                       const uint16_t* grad_y, const uint16_t* grad_sum, int64_t rows,
                                       int64_t columns, uint16_t* grad_s, uint16_t* grad_residual,
                                       uint16_t* grad_weight, float* partial) {
  using ernie5::typed;
  ernie5::backward(typed(s), typed(weight), inverse, typed(grad_y), typed(grad_sum), rows, columns, typed(grad_s),
                   typed(grad_residual), typed(grad_weight), partial);
}

}  // extern "C"
