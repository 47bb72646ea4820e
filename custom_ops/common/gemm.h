// Matrix products for the CPU kernels: a register-tiled kernel, the packing that feeds it, and a threaded gemm.
//
// One kernel serves float and bfloat16. It multiplies `units` of 32 bits: a float, or a pair of bf16 values that stand
// next to each other along the summed axis. A tile is up to kTileRows x 32: a broadcast from every row of the left
// operand times two vectors of the right one. With AMX, bf16 tiles are 32 x 32 and done by the matrix unit.
//
// Left operand:  Left{data, row, step}: unit (i, p) stands at data[i * row + p * step].
// Right operand: panels of 16 columns: unit (p, j) of a panel stands at panel[p * stride + j].
// Sums run over p in float, in order within pieces that depend on the depth alone, so a result does not depend on how its
// rows and columns are cut into tiles.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <vector>

#include "common/parallel.h"
#include "common/simd.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif
#if defined(__AVX512F__) && defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__linux__)
#define ERNIE5_AMX 1
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace ernie5 {

template <class T>
using Unit = std::conditional_t<std::is_same_v<T, float>, float, uint32_t>;
// Values of T in a unit, and what packed depths are rounded up to (a tile of the matrix unit is 16 units deep).
template <class T>
constexpr int64_t kPerUnit = 4 / static_cast<int64_t>(sizeof(T));
template <class T>
constexpr int64_t kDepthAlign = std::is_same_v<T, float> ? 1 : 16;

#if defined(__AVX512F__)
constexpr int kTileRows = 12;  // 24 accumulators, and a pointer register for every row
#else
constexpr int kTileRows = 3;  // 12 accumulators of eight floats
#endif
constexpr int64_t kPanel = 16;  // columns of a packed panel
constexpr int64_t kTileDepth = 192;  // units of two panels that share the first-level cache with those of a tile's rows

inline int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }
inline int64_t divide_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

// Units along a packed axis of `count` values.
template <class T>
int64_t packed_units(int64_t count) {
  return round_up(divide_up(count, kPerUnit<T>), kDepthAlign<T>);
}

// Memory of the calling thread that is kept between calls, aligned to a cache line; `slot` tells buffers apart.
template <class T, int slot>
T* scratch(int64_t count) {
  struct Buffer {
    void* data = nullptr;
    size_t size = 0;
    ~Buffer() { std::free(data); }
  };
  static thread_local Buffer buffer;
  size_t size = static_cast<size_t>(round_up(count * static_cast<int64_t>(sizeof(T)) + 64, 4096));
  if (buffer.size < size) {
    std::free(buffer.data);
    buffer.data = std::aligned_alloc(4096, size);
    buffer.size = size;
  }
  return static_cast<T*>(buffer.data);
}

// Memory that will be needed soon, brought into the second-level cache a line now and then during the products done
// meanwhile: all at once it would take the fill buffers that the products themselves need.
struct Ahead {
  uint32_t pattern = 0xff;  // in which of eight steps
  int64_t burst = 0;        // lines at once beside products of tiles, see matrix_gemm.h
  const char* at = nullptr;
  const char* end = nullptr;
  const char* then = nullptr;  // a second region after the first
  const char* then_end = nullptr;

  // At least `lines` lines every `steps` steps, or one a step.
  void spread(int64_t lines, int64_t steps) {
    const int64_t of_eight = divide_up(8 * lines, steps);
    pattern = of_eight > 6 ? 0xff : of_eight > 4 ? 0xdb : of_eight > 2 ? 0x55 : 0x11;
  }
  int64_t lines_in(int64_t steps) const { return divide_up(steps, 8) * __builtin_popcount(pattern); }

  // Where to continue for the next `steps` steps; null when there is nothing left.
  const char* take(int64_t steps) { return take_lines(lines_in(steps)); }
  const char* take_lines(int64_t lines) {
    if (end - at < lines * 64) {
      if (then == nullptr) return nullptr;
      at = then, end = then_end, then = nullptr;
      if (end - at < lines * 64) return nullptr;
    }
    const char* first = at;
    at += lines * 64;
    return first;
  }
};

template <class T>
struct Left {
  const Unit<T>* data;
  int64_t row, step;
  Left from(int64_t first) const { return {data + first * row, row, step}; }
};

// ---------------------------------------------------------------------------------------------- the register tile

inline f32x16 multiply_add(f32x16 sum, float a, f32x16 b) { return sum + a * b; }

inline f32x16 as_float(u32x16 v) {
  f32x16 result;
  std::memcpy(&result, &v, sizeof result);
  return result;
}
inline f32x16 multiply_add(f32x16 sum, uint32_t a, u32x16 b) {
#if defined(__AVX512BF16__)
  return (f32x16)_mm512_dpbf16_ps((__m512)sum, (__m512bh)(u32x16{} + a), (__m512bh)b);
#else
  float low, high;
  uint32_t low_bits = a << 16, high_bits = a & 0xffff0000u;
  std::memcpy(&low, &low_bits, sizeof low);
  std::memcpy(&high, &high_bits, sizeof high);
  return sum + low * as_float(b << 16) + high * as_float(b & 0xffff0000u);
#endif
}

inline u32x16 load(const uint32_t* p) { return *reinterpret_cast<const u32x16*>(p); }

// finish(i, left, right) receives row i of the tile: 16 columns of the first panel and 16 of the second. It is passed
// by value, and should capture by value: what it holds then stays in registers while it writes through pointers.
template <class T, int rows, bool ahead, class Finish>
inline __attribute__((always_inline)) void tile(Left<T> a, int64_t depth, const Unit<T>* b0, const Unit<T>* b1,
                                                int64_t stride, const char* soon, uint32_t pattern, Finish finish) {
  f32x16 left[rows], right[rows];
  const Unit<T>* row[rows];
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i) left[i] = right[i] = f32x16{}, row[i] = a.data + i * a.row;
  int64_t at = 0;
  for (int64_t p = 0; p < depth; ++p) {
    const auto first = load(b0), second = load(b1);
    b0 += stride, b1 += stride;
    if constexpr (ahead) {
      if ((pattern >> (p & 7)) & 1) __builtin_prefetch(soon, 0, 2), soon += 64;
    }
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i) {
      Unit<T> value = row[i][at];
      left[i] = multiply_add(left[i], value, first);
      right[i] = multiply_add(right[i], value, second);
    }
    at += a.step;
  }
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i) finish(i, left[i], right[i]);
}

// `tile` with `count` rows (1 .. kTileRows), which the compiler must know.
template <class T, int rows, class Finish>
void tile_of(int64_t count, Left<T> a, int64_t depth, const Unit<T>* b0, const Unit<T>* b1, int64_t stride,
             const char* soon, uint32_t pattern, const Finish& finish) {
  if (count == rows) {
    if (soon != nullptr) return tile<T, rows, true>(a, depth, b0, b1, stride, soon, pattern, finish);
    return tile<T, rows, false>(a, depth, b0, b1, stride, soon, pattern, finish);
  }
  if constexpr (rows > 1) tile_of<T, rows - 1>(count, a, depth, b0, b1, stride, soon, pattern, finish);
}

// ------------------------------------------------------------------------------------------------ the matrix unit

#if defined(ERNIE5_AMX)
namespace amx {

// Linux hands out the tile registers on request, once per process.
inline bool available() {
  static const bool granted = [] {
    constexpr int kRequestPermission = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  }();
  return granted;
}

// Tile shapes of the calling thread while it lives: eight tiles of 16 rows x 64 bytes.
struct Session {
  bool on;
  Session() : on(available()) {
    if (!on) return;
    alignas(64) uint8_t shape[64] = {};
    shape[0] = 1;
    for (int i = 0; i < 8; ++i) shape[16 + 2 * i] = 64, shape[48 + i] = 16;
    __asm__ volatile("" ::"r"(shape) : "memory");  // the intrinsic tells the compiler of eight bytes only
    _tile_loadconfig(shape);
  }
  ~Session() {
    if (on) _tile_release();
  }
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;
};

// Up to 32 rows x 32 columns into out[32][32]; the left operand has whole tiles of rows.
template <bool both, bool ahead>
inline void product(Left<bf16> a, int64_t depth, const uint32_t* b0, const uint32_t* b1, int64_t stride,
                    const char* soon, uint32_t pattern, float* out) {
  const uint32_t* lower = a.data + 16 * a.row;
  const size_t a_bytes = static_cast<size_t>(a.row) * 4, b_bytes = static_cast<size_t>(stride) * 4;
  _tile_zero(0);
  _tile_zero(1);
  if (both) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t p = 0; p < depth; p += 16) {
    _tile_loadd(6, b0 + p * stride, b_bytes);
    _tile_loadd(4, a.data + p, a_bytes);
    _tile_loadd(7, b1 + p * stride, b_bytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if (both) {
      _tile_loadd(5, lower + p, a_bytes);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    if constexpr (ahead) {
      for (int line = 0; line < 2 * __builtin_popcount(pattern); ++line) __builtin_prefetch(soon, 0, 2), soon += 64;
    }
  }
  _tile_stored(0, out, 128);
  _tile_stored(1, out + 16, 128);
  if (both) {
    _tile_stored(2, out + 16 * 32, 128);
    _tile_stored(3, out + 16 * 32 + 16, 128);
  }
}

template <class Finish>
void multiply(int64_t rows, Left<bf16> a, int64_t depth, const uint32_t* b0, const uint32_t* b1, int64_t stride,
              Ahead& ahead, Finish finish) {
  alignas(64) float out[32 * 32];
  for (int64_t first = 0; first < rows; first += 32) {
    const char* soon = ahead.take(depth);
    Left<bf16> block = a.from(first);
    if (rows - first > 16) {
      soon != nullptr ? product<true, true>(block, depth, b0, b1, stride, soon, ahead.pattern, out)
                      : product<true, false>(block, depth, b0, b1, stride, soon, ahead.pattern, out);
    } else {
      soon != nullptr ? product<false, true>(block, depth, b0, b1, stride, soon, ahead.pattern, out)
                      : product<false, false>(block, depth, b0, b1, stride, soon, ahead.pattern, out);
    }
    int64_t count = std::min<int64_t>(32, rows - first);
    for (int64_t i = 0; i < count; ++i) finish(first + i, load(out + i * 32), load(out + i * 32 + 16));
  }
}

}  // namespace amx
using MatrixUnit = amx::Session;
#else
struct MatrixUnit {
  bool on = false;
};
#endif

// finish(i, left, right) for every row i in [0, rows): the products with panels b0 and b1. `unit` says whether the
// matrix unit is there (hold a MatrixUnit around a run of calls); it reads whole tiles of 16 rows of `a`, and wants
// depth to be a multiple of 16 and a.step 1, which is what the packing below gives.
template <class T, class Finish>
void multiply([[maybe_unused]] const MatrixUnit& unit, int64_t rows, Left<T> a, int64_t depth, const Unit<T>* b0,
              const Unit<T>* b1, int64_t stride, Ahead& ahead, Finish finish) {
#if defined(ERNIE5_AMX)
  if constexpr (std::is_same_v<T, bf16>) {
    if (unit.on) return amx::multiply(rows, a, depth, b0, b1, stride, ahead, finish);
  }
#endif
  // Tiles of nearly equal height, over as much of the summed axis as lets the panels stay in the first-level cache.
  const int64_t height = divide_up(rows, std::max<int64_t>(1, divide_up(rows, kTileRows)));
  const int64_t pieces = std::max<int64_t>(1, divide_up(depth, kTileDepth));
  const int64_t piece = std::max<int64_t>(8, round_up(divide_up(depth, pieces), 8));
  float* sums = depth > piece ? scratch<float, 103>(rows * 2 * kPanel) : nullptr;
  for (int64_t p = 0; p < depth || p == 0; p += piece) {
    const int64_t steps = std::min(piece, depth - p);
    const Left<T> part{a.data + p * a.step, a.row, a.step};
    const Unit<T>*p0 = b0 + p * stride, *p1 = b1 + p * stride;
    for (int64_t first = 0; first < rows; first += height) {
      const int64_t count = std::min(rows - first, height);
      const char* soon = ahead.take(steps);
      float* before = p > 0 ? sums + first * 2 * kPanel : nullptr;
      if (p + piece < depth) {
        float* to = sums + first * 2 * kPanel;
        auto keep = [before, to](int i, f32x16 left, f32x16 right) {
          if (before != nullptr) left += load(before + i * 32), right += load(before + i * 32 + 16);
          store(to + i * 32, left), store(to + i * 32 + 16, right);
        };
        tile_of<T, kTileRows>(count, part.from(first), steps, p0, p1, stride, soon, ahead.pattern, keep);
      } else {
        auto shifted = [finish, first, before](int i, f32x16 left, f32x16 right) {
          if (before != nullptr) left += load(before + i * 32), right += load(before + i * 32 + 16);
          finish(first + i, left, right);
        };
        tile_of<T, kTileRows>(count, part.from(first), steps, p0, p1, stride, soon, ahead.pattern, shifted);
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------------- packing

// Rows of a row-major matrix, or chosen ones: row i is data + (index ? index[i] : i) * stride.
template <class T>
struct Rows {
  const T* data;
  int64_t stride;
  const int32_t* index = nullptr;
  const T* operator[](int64_t i) const { return data + (index != nullptr ? index[i] : i) * stride; }
  Rows from(int64_t first) const {
    if (index != nullptr) return {data, stride, index + first};
    return {data + first * stride, stride, nullptr};
  }
  Rows column(int64_t first) const { return {data + first, stride, index}; }
};

typedef uint32_t u32x4 __attribute__((vector_size(16), aligned(4), may_alias));
typedef uint32_t u32x8 __attribute__((vector_size(32), aligned(4), may_alias));

// to[c * stride + r] = from[r][c] for 16 rows of 32-bit units and 4 * quads columns; `from` has 16 pointers.
inline void transpose_quads(const uint32_t* const* from, int64_t quads, uint32_t* to, int64_t stride) {
  for (int64_t c = 0; c < 4 * quads; c += 4) {
    auto four = [&](int r) { return *reinterpret_cast<const u32x4*>(from[r] + c); };
#if defined(__AVX512F__)
    u32x16 m[4];  // quarter q of m[i]: four columns of row 4 q + i
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      u32x8 low = __builtin_shufflevector(four(i), four(4 + i), 0, 1, 2, 3, 4, 5, 6, 7);
      u32x8 high = __builtin_shufflevector(four(8 + i), four(12 + i), 0, 1, 2, 3, 4, 5, 6, 7);
      m[i] = __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    }
    const i32x16 low32 = {0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29};
    const i32x16 low64 = {0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29};
    u32x16 a = __builtin_shuffle(m[0], m[1], low32), b = __builtin_shuffle(m[0], m[1], low32 + 2);
    u32x16 d = __builtin_shuffle(m[2], m[3], low32), e = __builtin_shuffle(m[2], m[3], low32 + 2);
    auto put_line = [&](int i, u32x16 v) { *reinterpret_cast<u32x16*>(to + (c + i) * stride) = v; };
    put_line(0, __builtin_shuffle(a, d, low64)), put_line(1, __builtin_shuffle(a, d, low64 + 2));
    put_line(2, __builtin_shuffle(b, e, low64)), put_line(3, __builtin_shuffle(b, e, low64 + 2));
#else
    for (int q = 0; q < 16; q += 4) {
      u32x4 a = __builtin_shufflevector(four(q), four(q + 1), 0, 4, 1, 5);
      u32x4 b = __builtin_shufflevector(four(q), four(q + 1), 2, 6, 3, 7);
      u32x4 d = __builtin_shufflevector(four(q + 2), four(q + 3), 0, 4, 1, 5);
      u32x4 e = __builtin_shufflevector(four(q + 2), four(q + 3), 2, 6, 3, 7);
      auto put_line = [&](int i, u32x4 v) { *reinterpret_cast<u32x4*>(to + (c + i) * stride + q) = v; };
      put_line(0, __builtin_shufflevector(a, d, 0, 1, 4, 5)), put_line(1, __builtin_shufflevector(a, d, 2, 3, 6, 7));
      put_line(2, __builtin_shufflevector(b, e, 0, 1, 4, 5)), put_line(3, __builtin_shufflevector(b, e, 2, 3, 6, 7));
    }
#endif
  }
}

// The same for any number of columns.
inline void transpose16(const uint32_t* const* from, int64_t columns, uint32_t* to, int64_t stride) {
  transpose_quads(from, columns / 4, to, stride);
  for (int64_t c = columns / 4 * 4; c < columns; ++c) {
    for (int r = 0; r < 16; ++r) std::memcpy(to + c * stride + r, from[r] + c, 4);
  }
}

// 16 bf16 of two rows, interleaved: unit j = (upper[j], lower[j]).
inline u32x16 interleave(u16x16 upper, u16x16 lower) {
  return __builtin_convertvector(upper, u32x16) | (__builtin_convertvector(lower, u32x16) << 16);
}
#if defined(__AVX512BW__)
// 32 of each row: the first sixteen units to `first`, the others to `second`.
inline void interleave(const bf16* upper, const bf16* lower, uint32_t* first, uint32_t* second) {
  const __m512i quads = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);  // so that halves of lanes are sixteen neighbours
  const __m512i a = _mm512_maskz_permutexvar_epi64(0xff, quads, _mm512_loadu_si512(upper));
  const __m512i b = _mm512_maskz_permutexvar_epi64(0xff, quads, _mm512_loadu_si512(lower));
  _mm512_storeu_si512(first, _mm512_unpacklo_epi16(a, b));
  _mm512_storeu_si512(second, _mm512_unpackhi_epi16(a, b));
}
#endif
inline u16x16 bits_part(const bf16* p, int64_t count) {
  u16x16 v{};
  if (count >= 16) return *reinterpret_cast<const u16x16*>(p);
  std::memcpy(&v, p, static_cast<size_t>(count) * sizeof(bf16));
  return v;
}

// Row stride, in units, of a left operand with `units` units a row: whole cache lines, but no multiple of a large
// power of two, which would put every row into the same cache sets.
inline int64_t spread(int64_t units) {
  const int64_t whole = round_up(units, 16);
  return whole % 64 == 0 ? whole + 16 : whole;
}

// Whether rows of floats can be read where they are: nothing to gather, and no two rows fight for the same cache sets.
inline bool in_place(Rows<float> from) { return from.index == nullptr && from.stride % 64 != 0; }

// How many rows the matrix unit reads for `rows` rows.
template <class T>
int64_t padded_rows(int64_t rows) {
  return std::is_same_v<T, float> ? rows : round_up(rows, 16);
}

// Left operand whose rows are rows of `from`: copies [rows, depth] with row stride spread(packed_units(depth)).
template <class T>
Left<T> pack_left(Rows<T> from, int64_t rows, int64_t depth, Unit<T>* to) {
  int64_t units = packed_units<T>(depth), stride = spread(units);
  for (int64_t i = 0; i < rows; ++i) {
    char* line = reinterpret_cast<char*>(to + i * stride);
    size_t bytes = static_cast<size_t>(depth) * sizeof(T);
    std::memcpy(line, from[i], bytes);
    std::memset(line + bytes, 0, static_cast<size_t>(units) * 4 - bytes);
  }
  return {to, stride, 1};
}
template <class T>
int64_t left_size(int64_t rows, int64_t depth) {
  return padded_rows<T>(rows) * spread(packed_units<T>(depth));
}

// Left operand whose rows are columns of `from`: [columns, depth], summed over the rows of `from`.
inline Left<float> pack_left_columns(Rows<float> from, int64_t depth, int64_t columns, float* to) {
  if (in_place(from)) return {from.data, 1, from.stride};
  int64_t stride = spread(columns);
  for (int64_t p = 0; p < depth; ++p) {
    std::memcpy(to + p * stride, from[p], static_cast<size_t>(columns) * sizeof(float));
  }
  return {to, 1, stride};
}
inline Left<bf16> pack_left_columns(Rows<bf16> from, int64_t depth, int64_t columns, uint32_t* to) {
  int64_t units = packed_units<bf16>(depth), stride = spread(units);
  u32x16 block[16];
  const uint32_t* lines[16];
  for (int r = 0; r < 16; ++r) lines[r] = reinterpret_cast<const uint32_t*>(&block[r]);
  for (int64_t p = 0; p < units; p += 16) {
    for (int64_t c = 0; c < columns; c += 16) {
      int64_t count = std::min<int64_t>(16, columns - c);
      for (int64_t r = 0; r < 16; ++r) {
        int64_t n = 2 * (p + r);
        block[r] = interleave(n < depth ? bits_part(from[n] + c, count) : u16x16{},
                              n + 1 < depth ? bits_part(from[n + 1] + c, count) : u16x16{});
      }
      // Rows past `columns` are zeros that the padding of `to` has room for.
      transpose_quads(lines, 4, to + c * stride + p, stride);
    }
  }
  return {to, stride, 1};
}
template <class T>
int64_t left_columns_size(int64_t depth, int64_t columns) {
  if (std::is_same_v<T, float>) return depth * spread(columns);
  return round_up(columns, 16) * spread(packed_units<T>(depth));
}

// Right operand: panels of 16 columns; panel j begins at data + j * panel, its rows stand `stride` apart.
template <class T>
struct Right {
  const Unit<T>* data;
  int64_t panel, stride;
  const Unit<T>* operator[](int64_t j) const { return data + j * panel; }
};
template <class T>
int64_t right_size(int64_t depth, int64_t columns) {
  return packed_units<T>(depth) * round_up(columns, kPanel);
}

// Packs [depth, columns], summed over its rows. Whole float panels are used where they are when `reuse` allows it, or
// when nothing speaks against it.
inline Right<float> pack_right(Rows<float> from, int64_t depth, int64_t columns, float* to, bool reuse = true) {
  if (columns % kPanel == 0 && (in_place(from) || (reuse && from.index == nullptr))) {
    return {from.data, kPanel, from.stride};
  }
  for (int64_t c = 0; c < columns; c += kPanel) {
    int64_t count = std::min<int64_t>(kPanel, columns - c);
    for (int64_t p = 0; p < depth; ++p, to += kPanel) {
      store(to, count == kPanel ? load(from[p] + c) : load_part(from[p] + c, count));
    }
  }
  return {to - depth * round_up(columns, kPanel), depth * kPanel, kPanel};
}
inline Right<bf16> pack_right(Rows<bf16> from, int64_t depth, int64_t columns, uint32_t* to, bool /*reuse*/ = true) {
  const int64_t units = packed_units<bf16>(depth), panel = units * kPanel;
  for (int64_t p = 0; p < units; ++p, to += kPanel) {  // rows in the order of memory, which the processor foresees
    const int64_t n = 2 * p;
    int64_t c = 0;
#if defined(__AVX512BW__)
    if (n + 1 < depth) {
      for (; c + 2 * kPanel <= columns; c += 2 * kPanel) {
        interleave(from[n] + c, from[n + 1] + c, to + c * units, to + c * units + panel);
      }
    }
#endif
    for (; c < columns; c += kPanel) {
      int64_t count = std::min<int64_t>(kPanel, columns - c);
      *reinterpret_cast<u32x16*>(to + c * units) = interleave(n < depth ? bits_part(from[n] + c, count) : u16x16{},
                                                             n + 1 < depth ? bits_part(from[n + 1] + c, count) : u16x16{});
    }
  }
  return {to - panel, panel, kPanel};
}

// Packs the transpose of [columns, depth]: column j of the operand is row j of `from`.
template <class T>
Right<T> pack_right_transposed(Rows<T> from, int64_t depth, int64_t columns, Unit<T>* to) {
  int64_t units = packed_units<T>(depth), whole = depth / kPerUnit<T>;
  static const uint32_t zeros[64] = {};
  for (int64_t c = 0; c < columns; c += kPanel) {
    int64_t count = std::min<int64_t>(kPanel, columns - c);
    uint32_t* panel = reinterpret_cast<uint32_t*>(to + c * units);
    const uint32_t* lines[16];
    if (count == kPanel) {
      for (int r = 0; r < 16; ++r) lines[r] = reinterpret_cast<const uint32_t*>(from[c + r]);
      transpose16(lines, whole, panel, kPanel);
    } else {
      for (int64_t p = 0; p < whole; p += 64) {
        int64_t part = std::min<int64_t>(64, whole - p);
        for (int64_t r = 0; r < 16; ++r) {
          lines[r] = r < count ? reinterpret_cast<const uint32_t*>(from[c + r]) + p : zeros;
        }
        transpose16(lines, part, panel + p * kPanel, kPanel);
      }
    }
    if (units > whole) std::memset(panel + whole * kPanel, 0, static_cast<size_t>((units - whole) * kPanel) * 4);
    if constexpr (kPerUnit<T> == 2) {
      if (depth % 2 != 0) {
        for (int64_t r = 0; r < count; ++r) panel[whole * kPanel + r] = from[c + r][depth - 1].bits;
      }
    }
  }
  return {to, units * kPanel, kPanel};
}

// The first `count` (up to 16; fewer or none at an edge) values of a row of a tile.
template <class T>
void put(T* to, f32x16 value, int64_t count) {
  if (count >= 16) {
    store(to, value);
  } else if (count > 0) {
    store_part(to, value, count);
  }
}
template <class T>
f32x16 get(const T* from, int64_t count) {
  if (count >= 16) return load(from);
  return count > 0 ? load_part(from, count) : f32x16{};
}

// `put`, past the caches where `through`: for results that nobody reads soon, without first reading the memory they
// replace. Ordinary stores where lines are not whole, and for bf16, of which a panel is half a line.
inline void put_through(bf16* to, f32x16 value, int64_t count, bool /*through*/) { put(to, value, count); }
inline void put_through(float* to, f32x16 value, int64_t count, [[maybe_unused]] bool through) {
#if defined(__AVX512F__)
  if (through && count >= 16 && reinterpret_cast<uintptr_t>(to) % 64 == 0) return _mm512_stream_ps(to, (__m512)value);
#endif
  put(to, value, count);
}

// ------------------------------------------------------------------------------------------------ a threaded gemm

// C [M,N] = A B, summed over K. NN: A [M,K], B [K,N]. NT: A [M,K], B [N,K]. TN: A [K,M], B [K,N].
enum class Form { NN, NT, TN };

constexpr int64_t kBlockRows = 192, kBlockColumns = 256, kBlockDepth = 384;

// One of the products that add up to C.
template <class T>
struct Term {
  Rows<T> a, b;
  int64_t K;
};

// One block of C, the sum of the terms: rows [m0, m1), columns [n0, n1).
template <class T>
void gemm_block(const MatrixUnit& unit, Form form, const std::vector<Term<T>>& terms, int64_t m0, int64_t m1,
                int64_t n0, int64_t n1, T* c, int64_t ldc) {
  const int64_t rows = m1 - m0, columns = n1 - n0;
  size_t final = 0;  // the last term with anything in it, if there is one
  int64_t depth_max = 0;
  for (size_t t = 0; t < terms.size(); ++t) {
    if (terms[t].K > 0) final = t;
    depth_max = std::max(depth_max, std::min(terms[t].K, kBlockDepth));
  }
  auto* left = scratch<Unit<T>, 100>(std::max(left_size<T>(rows, depth_max), left_columns_size<T>(depth_max, rows)));
  auto* right = scratch<Unit<T>, 101>(right_size<T>(depth_max, columns));
  constexpr bool direct = std::is_same_v<T, float>;
  float* sums;
  int64_t stride;
  if constexpr (direct) {
    sums = c + m0 * ldc + n0, stride = ldc;
  } else {
    stride = round_up(columns, 16), sums = scratch<float, 102>(rows * stride);
  }
  Ahead ahead;
  bool more = false;
  for (size_t t = 0; t <= final; ++t) {
    const auto [a, b, K] = terms[t];
    for (int64_t k0 = 0; k0 < K || (k0 == 0 && t == final); k0 += kBlockDepth) {  // zeros where all terms are empty
      const int64_t depth = std::min(kBlockDepth, K - k0), units = packed_units<T>(depth);
      Left<T> x = form == Form::TN ? pack_left_columns(a.from(k0).column(m0), depth, rows, left)
                                   : pack_left(a.from(m0).column(k0), rows, depth, left);
      Right<T> y = form == Form::NT ? pack_right_transposed(b.from(n0).column(k0), depth, columns, right)
                                    : pack_right(b.from(k0).column(n0), depth, columns, right, rows <= 2 * kTileRows);
      const bool last = t == final && k0 + kBlockDepth >= K;
      for (int64_t j = 0; j < columns; j += 2 * kPanel) {
        const int64_t first = std::min(kPanel, columns - j), second = std::min(kPanel, columns - j - first);
        const Unit<T>* b0 = y[j / kPanel];
        multiply<T>(unit, rows, x, units, b0, second > 0 ? y[j / kPanel + 1] : b0, y.stride, ahead,
                    [=](int64_t i, f32x16 p, f32x16 q) {
                      float* to = sums + i * stride + j;
                      if (more) p += get(to, first), q += get(to + kPanel, second);
                      if constexpr (!direct) {
                        if (last) {
                          T* out = c + (m0 + i) * ldc + n0 + j;
                          put(out, p, first), put(out + kPanel, q, second);
                          return;
                        }
                      }
                      put(to, p, first), put(to + kPanel, q, second);
                    });
      }
      more = true;
    }
  }
}

// C [M,N] = A B on all threads; float or bf16, sums in float.
template <class T>
void gemm(Form form, int64_t M, int64_t N, int64_t K, Rows<T> a, Rows<T> b, T* c, int64_t ldc) {
  // Smaller blocks where there would be too few of them for the threads.
  int64_t block_rows = kBlockRows, block_columns = kBlockColumns;
  const int64_t wanted = 3 * num_threads();
  auto blocks = [&] { return divide_up(M, block_rows) * divide_up(N, block_columns); };
  while (blocks() < wanted && (block_rows > 48 || block_columns > 64)) {
    if (std::min(M, block_rows) > 48 && block_rows >= block_columns) block_rows /= 2;
    else if (block_columns > 64) block_columns /= 2;
    else if (block_rows > 48) block_rows /= 2;
  }
  const int64_t down = divide_up(M, block_rows), across = divide_up(N, block_columns);
  parallel_for(down * across, [&](int64_t task, int) {
    MatrixUnit unit;
    const int64_t m0 = task % down * block_rows, n0 = task / down * block_columns;
    gemm_block(unit, form, {{a, b, K}}, m0, std::min(M, m0 + block_rows), n0, std::min(N, n0 + block_columns), c, ldc);
  });
}

}  // namespace ernie5
