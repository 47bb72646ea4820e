#include "swiglu/swiglu.h"

#include <cstdint>

#include "common/parallel.h"
#include "common/simd.h"

namespace ernie5 {
namespace swiglu {
namespace {

constexpr int64_t kLanes = 16;
constexpr int64_t kGrain = 1 << 13;  // values a thread takes at least

f32x16 sigmoid(f32x16 v) { return 1.0f / (1.0f + exp(-v)); }

// body(gate, up, column, lanes) for every piece of every row's columns, `lanes` (up to 16) of them at a time.
template <class Body>
void every_piece(int64_t rows, int64_t width, Body&& body) {
  const int64_t grain = kGrain / (width > 0 ? width : 1) + 1;
  parallel_range(rows, grain, 1, [&](int64_t begin, int64_t end, int) {
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t j = 0; j < width; j += kLanes) body(row, j, width - j < kLanes ? width - j : kLanes);
    }
  });
}

template <class T>
f32x16 get(const T* from, int64_t lanes) {
  return lanes == kLanes ? load(from) : load_part(from, lanes);
}
template <class T>
void put(T* to, f32x16 value, int64_t lanes) {
  lanes == kLanes ? store(to, value) : store_part(to, value, lanes);
}

template <class T>
void forward(const T* hidden, int64_t rows, int64_t width, T* out) {
  every_piece(rows, width, [=](int64_t row, int64_t j, int64_t lanes) {
    const T* gates = hidden + row * 2 * width + j;
    f32x16 gate = get(gates, lanes), up = get(gates + width, lanes);
    put(out + row * width + j, gate * sigmoid(gate) * up, lanes);
  });
}

template <class T>
void backward(const T* hidden, const T* grad_out, int64_t rows, int64_t width, T* grad_hidden) {
  every_piece(rows, width, [=](int64_t row, int64_t j, int64_t lanes) {
    const T* gates = hidden + row * 2 * width + j;
    T* to = grad_hidden + row * 2 * width + j;
    f32x16 gate = get(gates, lanes), up = get(gates + width, lanes), grad = get(grad_out + row * width + j, lanes);
    f32x16 s = sigmoid(gate), silu = gate * s;
    put(to, grad * up * s * (1.0f + gate - silu), lanes);
    put(to + width, grad * silu, lanes);
  });
}

const bf16* halves(const uint16_t* p) { return reinterpret_cast<const bf16*>(p); }
bf16* halves(uint16_t* p) { return reinterpret_cast<bf16*>(p); }

}  // namespace
}  // namespace swiglu
}  // namespace ernie5

using ernie5::swiglu::halves;

extern "C" void ernie5_swiglu_forward_cpu_f32(const float* hidden, int64_t rows, int64_t width, float* out) {
  ernie5::swiglu::forward(hidden, rows, width, out);
}

extern "C" void ernie5_swiglu_forward_cpu_bf16(const uint16_t* hidden, int64_t rows, int64_t width, uint16_t* out) {
  ernie5::swiglu::forward(halves(hidden), rows, width, halves(out));
}

extern "C" void ernie5_swiglu_backward_cpu_f32(const float* hidden, const float* grad_out, int64_t rows, int64_t width,
                                               float* grad_hidden) {
  ernie5::swiglu::backward(hidden, grad_out, rows, width, grad_hidden);
}

extern "C" void ernie5_swiglu_backward_cpu_bf16(const uint16_t* hidden, const uint16_t* grad_out, int64_t rows,
                                                int64_t width, uint16_t* grad_hidden) {
  ernie5::swiglu::backward(halves(hidden), halves(grad_out), rows, width, halves(grad_hidden));
}
