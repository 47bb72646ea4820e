// The arithmetic of one tile: outer-product micro-kernels, a 16 x 16 transpose, 2^x.
#pragma once

#include <cstdint>

#include "common/simd.h"
#include "flashmask_attention/mask.h"

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace ernie5 {
namespace flashmask {

#define ERNIE5_INLINE inline __attribute__((always_inline))

// acc[i][v] += sum over k of a[i * a_row + k * a_step] * b[k * b_step + 16 v ..].
template <int R, int V>
ERNIE5_INLINE void multiply(f32x16 (&acc)[R][V], const float* a, int64_t a_row, int64_t a_step, const float* b,
                            int64_t b_step, int64_t depth) {
  for (int64_t k = 0; k < depth; ++k, a += a_step, b += b_step) {
    f32x16 right[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) right[v] = load(b + v * kLanes);
#pragma GCC unroll 32
    for (int i = 0; i < R; ++i) {
      f32x16 left = a[i * a_row] - f32x16{};
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) acc[i][v] += left * right[v];
    }
  }
}

#ifdef __AVX512F__
constexpr __mmask16 kEveryLane = 0xffff;  // GCC warns about the forms without a mask
#endif

// 2^x, relative error below 2e-7, for x <= 1; a very negative x (down to -1e30) gives 0.
ERNIE5_INLINE f32x16 exp2(f32x16 x) {
#ifdef __AVX512F__
  f32x16 whole = (f32x16)_mm512_maskz_roundscale_ps(kEveryLane, (__m512)x, 0);
  f32x16 r = x - whole;
  f32x16 p = splat(1.326472021e-03f);
  p = p * r + 9.671513139e-03f;
  p = p * r + 5.550733766e-02f;
  p = p * r + 2.402224207e-01f;
  p = p * r + 6.931469776e-01f;
  p = p * r + 1.0f;
  return (f32x16)_mm512_maskz_scalef_ps(kEveryLane, (__m512)p, (__m512)whole);
#else
  return exp(x * 0.69314718055994531f);
#endif
}

// Swaps the off-diagonal halves of every 2s x 2s square of a 16 x 16 matrix.
template <int s>
ERNIE5_INLINE void swap_squares(f32x16 (&rows)[16]) {
  i32x16 upper, lower;
#pragma GCC unroll 16
  for (int lane = 0; lane < 16; ++lane) {
    upper[lane] = (lane & s) != 0 ? 16 + lane - s : lane;
    lower[lane] = (lane & s) != 0 ? 16 + lane : lane + s;
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    if ((i & s) != 0) continue;
    f32x16 a = rows[i], b = rows[i + s];
    rows[i] = __builtin_shuffle(a, b, upper);
    rows[i + s] = __builtin_shuffle(a, b, lower);
  }
}

// to[c * to_row + r] = factor * from[r * from_row + c] for 64 rows r and `width` columns c, a multiple of 16.
inline void transpose_tile(const float* from, int64_t from_row, int64_t width, float factor, float* to) {
  for (int64_t column = 0; column < width; column += 16) {
    for (int row = 0; row < kRows; row += 16) {
      f32x16 square[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) square[i] = load(from + (row + i) * from_row + column) * factor;
      swap_squares<8>(square);
      swap_squares<4>(square);
      swap_squares<2>(square);
      swap_squares<1>(square);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) store(to + (column + i) * kRows + row, square[i]);
    }
  }
}

}  // namespace flashmask
}  // namespace ernie5
