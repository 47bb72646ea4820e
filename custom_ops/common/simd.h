// Sixteen floats at a time, in GCC's vector extension: the compiler maps them to AVX-512, to two AVX2 registers or to
// four SSE ones, whatever -march=native offers.
#pragma once

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include <cmath>
#include <cstdint>
#include <cstring>

namespace ernie5 {

typedef float f32x16 __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t i32x16 __attribute__((vector_size(64), aligned(4), may_alias));

inline f32x16 load(const float* p) { return *reinterpret_cast<const f32x16*>(p); }
inline void store(float* p, f32x16 v) { *reinterpret_cast<f32x16*>(p) = v; }
inline f32x16 splat(float v) { return f32x16{} + v; }

// The first `count` (0..16) lanes; the others are `rest` and no memory behind them is touched.
inline f32x16 load_part(const float* p, int64_t count, float rest = 0.0f) {
  f32x16 v = splat(rest);
  std::memcpy(&v, p, static_cast<size_t>(count) * sizeof(float));
  return v;
}
inline void store_part(float* p, f32x16 v, int64_t count) {
  std::memcpy(p, &v, static_cast<size_t>(count) * sizeof(float));
}

// bfloat16: the upper half of a float. Kernels read and write it, and compute in float.
struct bf16 {
  uint16_t bits;
};
typedef uint16_t u16x16 __attribute__((vector_size(32), aligned(2), may_alias));
typedef uint32_t u32x16 __attribute__((vector_size(64), aligned(4), may_alias));

inline f32x16 widen(u16x16 v) {
#if defined(__AVX512F__)  // GCC 12 widens in two halves
  __m256i half;
  std::memcpy(&half, &v, sizeof half);
  __m512i zeros_above = _mm512_maskz_cvtepu16_epi32(0xffff, half);
  u32x16 wide;
  std::memcpy(&wide, &zeros_above, sizeof wide);
  wide <<= 16;
#else
  u32x16 wide = __builtin_convertvector(v, u32x16) << 16;
#endif
  f32x16 result;
  std::memcpy(&result, &wide, sizeof result);
  return result;
}
// Round to nearest, ties to even; a NaN stays a NaN. (The instruction takes denormal numbers as zero.)
inline u16x16 narrow(f32x16 v) {
#if defined(__AVX512BF16__)
  __m256bh half = _mm512_cvtneps_pbh(reinterpret_cast<const __m512&>(v));
  u16x16 result;
  std::memcpy(&result, &half, sizeof result);
  return result;
#else
  u32x16 wide;
  std::memcpy(&wide, &v, sizeof wide);
  u32x16 rounded = (wide + 0x7fffu + ((wide >> 16) & 1u)) >> 16;
  u32x16 is_nan = (u32x16)(v != v);
  rounded = is_nan ? ((wide >> 16) | 0x40u) : rounded;
  return __builtin_convertvector(rounded, u16x16);
#endif
}
inline f32x16 load(const bf16* p) { return widen(*reinterpret_cast<const u16x16*>(p)); }
inline void store(bf16* p, f32x16 v) { *reinterpret_cast<u16x16*>(p) = narrow(v); }
inline f32x16 load_part(const bf16* p, int64_t count, float rest = 0.0f) {
  u16x16 v{};
  std::memcpy(&v, p, static_cast<size_t>(count) * sizeof(bf16));
  f32x16 wide = widen(v);
  for (int64_t i = count; i < 16; ++i) wide[i] = rest;
  return wide;
}
inline void store_part(bf16* p, f32x16 v, int64_t count) {
  u16x16 half = narrow(v);
  std::memcpy(p, &half, static_cast<size_t>(count) * sizeof(bf16));
}
inline float to_float(float v) { return v; }
inline float to_float(bf16 v) {
  uint32_t wide = static_cast<uint32_t>(v.bits) << 16;
  float result;
  std::memcpy(&result, &wide, sizeof result);
  return result;
}

inline f32x16 maximum(f32x16 a, f32x16 b) { return a > b ? a : b; }
inline f32x16 minimum(f32x16 a, f32x16 b) { return a < b ? a : b; }

// Sum and maximum of the lanes, halving: the order is fixed, and four steps deep instead of sixteen.
typedef float f32x8 __attribute__((vector_size(32)));
typedef float f32x4 __attribute__((vector_size(16)));
inline float sum(f32x16 v) {
  f32x8 a = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
            __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
  f32x4 b = __builtin_shufflevector(a, a, 0, 1, 2, 3) + __builtin_shufflevector(a, a, 4, 5, 6, 7);
  return (b[0] + b[2]) + (b[1] + b[3]);
}
inline float largest(f32x16 v) {
  f32x8 lower = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7);
  f32x8 upper = __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
  f32x8 a = lower > upper ? lower : upper;
  f32x4 left = __builtin_shufflevector(a, a, 0, 1, 2, 3), right = __builtin_shufflevector(a, a, 4, 5, 6, 7);
  f32x4 b = left > right ? left : right;
  float even = b[0] > b[2] ? b[0] : b[2], odd = b[1] > b[3] ? b[1] : b[3];
  return even > odd ? even : odd;
}

inline f32x16 sqrt(f32x16 v) {
#if defined(__AVX512F__)
  __m512 root = _mm512_maskz_sqrt_ps(0xffff, reinterpret_cast<const __m512&>(v));
  return reinterpret_cast<const f32x16&>(root);
#else
  for (int i = 0; i < 16; ++i) v[i] = std::sqrt(v[i]);
  return v;
#endif
}

// 1 / v within 1e-7 relative for v in [1, 1e38]; a NaN stays one.
inline f32x16 reciprocal(f32x16 v) {
#if defined(__AVX512F__)
  __m512 guess = _mm512_maskz_rcp14_ps(0xffff, reinterpret_cast<const __m512&>(v));
  f32x16 r = reinterpret_cast<const f32x16&>(guess);
  return r * (2.0f - v * r);
#else
  return 1.0f / v;
#endif
}

// Calls body(first, count) for each sixteen of [0, total); count is the constant 16 but for the last, shorter piece.
template <class Body>
__attribute__((always_inline)) inline void each16(int64_t total, Body&& body) {
  int64_t first = 0;
  for (; first + 16 <= total; first += 16) body(first, 16);
  if (first < total) body(first, static_cast<int>(total - first));
}
// load and store of `count` lanes, for each16: whole where count is the constant 16.
template <class T>
__attribute__((always_inline)) inline f32x16 load_some(const T* p, int count, float rest = 0.0f) {
  return count == 16 ? load(p) : load_part(p, count, rest);
}
template <class T>
__attribute__((always_inline)) inline void store_some(T* p, f32x16 v, int count) {
  count == 16 ? store(p, v) : store_part(p, v, count);
}

// e^x = fraction * 2^whole with a whole number and a fraction around [0.7, 1.42]; |x| below a few hundred.
struct SplitPower {
  f32x16 fraction, whole;
};
__attribute__((always_inline)) inline SplitPower split_exp(f32x16 x) {
  // Round to nearest by adding and taking away 1.5 * 2^23; volatile-free because -ffast-math is never used here.
  const f32x16 magic = splat(12582912.0f);
  f32x16 whole = (x * 1.44269504088896341f + magic) - magic;
  f32x16 r = x - whole * 0.693359375f;
  r = r - whole * -2.12194440e-4f;
  f32x16 p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return {p * r * r + r + 1.0f, whole};
}

// e^x with a relative error below 2e-7 over [-87, 88]; smaller arguments give 0, larger are cut to e^88.
inline f32x16 exp(f32x16 x) {
  const f32x16 low = splat(-87.0f);
  i32x16 live = x >= low;
  SplitPower power = split_exp(minimum(maximum(x, low), splat(88.0f)));
  i32x16 exponent = (__builtin_convertvector(power.whole, i32x16) + 127) << 23;
  f32x16 scale;
  std::memcpy(&scale, &exponent, sizeof scale);
  f32x16 result = power.fraction * scale;
  return live ? result : splat(0.0f);
}

// As exp, for where a NaN must stay one; two thirds of its instructions on AVX-512.
inline f32x16 exp_or_nan(f32x16 x) {
#if defined(__AVX512F__)
  const f32x16 low = splat(-200.0f), high = splat(88.0f);  // e^-200 is 0; a NaN passes comparisons in this order
  x = low > x ? low : x;
  x = high < x ? high : x;
  SplitPower power = split_exp(x);
  __m512 scaled = _mm512_maskz_scalef_ps(0xffff, reinterpret_cast<const __m512&>(power.fraction),
                                         reinterpret_cast<const __m512&>(power.whole));
  return reinterpret_cast<const f32x16&>(scaled);
#else
  f32x16 power = exp(x);
  return x == x ? power : x;
#endif
}

}  // namespace ernie5
