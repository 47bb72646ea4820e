// Products of a few rows of floats with a bf16 matrix on the matrix unit (AMX).
//
// A float is the sum of three bf16, exactly (see common/matrix_gemm.h), and the weights are bf16 already: three products
// are as good as one of floats. The parts of up to sixteen rows lie in up to three tiles, one part after the other, so
// weights pass once, at the rate of memory, where vectors would have to widen them and multiply row after row.
#pragma once

#include "common/matrix_gemm.h"

#if defined(ERNIE5_AMX)
namespace ernie5 {
namespace amx {

constexpr int64_t kFew = 3, kMany = 16;  // rows for which this pays, and for which it is made
constexpr int64_t kWide = 32;            // columns, or rows of the output head, that are done together

inline int64_t tiles_of(int64_t rows) { return divide_up(3 * rows, 16); }

// Registers 6 and 7 hold a left and a right tile. One stays, up to three at `from` pass through `moving`;
// their products are added to registers first, second and third. (The instructions want the numbers literally.)
#define ERNIE5_PASS(moving, from, first, second, third) \
  _tile_loadd(moving, from, 64);                        \
  _tile_dpbf16ps(first, 6, 7);                          \
  if constexpr (tiles > 1) {                            \
    _tile_loadd(moving, (from) + kTile, 64);            \
    _tile_dpbf16ps(second, 6, 7);                       \
  }                                                     \
  if constexpr (tiles > 2) {                            \
    _tile_loadd(moving, (from) + 2 * kTile, 64);        \
    _tile_dpbf16ps(third, 6, 7);                        \
  }

template <int tiles>
inline void clear() {
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (tiles > 1) {
    _tile_zero(2);
    _tile_zero(3);
  }
  if constexpr (tiles > 2) {
    _tile_zero(4);
    _tile_zero(5);
  }
}
template <int tiles>
inline void take(float* sums) {
  _tile_stored(0, sums, 64);
  _tile_stored(1, sums + kTile, 64);
  if constexpr (tiles > 1) {
    _tile_stored(2, sums + 2 * kTile, 64);
    _tile_stored(3, sums + 3 * kTile, 64);
  }
  if constexpr (tiles > 2) {
    _tile_stored(4, sums + 4 * kTile, 64);
    _tile_stored(5, sums + 5 * kTile, 64);
  }
}

// Line `line` of the sums in the even registers, or in the odd ones.
inline f32x16 line_of(const float* sums, int64_t line, int64_t odd) {
  return load(sums + (2 * (line / 16) + odd) * kTile + line % 16 * 16);
}

// ------------------------------------------------------------------------------------- weights [depth, columns]

// The parts of rows x[.][at .. at+depth) as left tiles: those of 32 values of the summed axis after each other. Values
// j and j + 16 share a unit.
inline void split_left(const float* const* x, int64_t at, int64_t depth, int64_t rows, uint32_t* to) {
  const int64_t tiles = tiles_of(rows);
  for (int64_t k = 0; k < depth; k += kDeep, to += tiles * kTile) {
    for (int64_t row = 0; row < rows; ++row) {
      u32x16 units[3];
      split(load(x[row] + at + k), load(x[row] + at + k + 16), units);
      for (int64_t part = 0; part < 3; ++part) {
        *reinterpret_cast<u32x16*>(to + (part * rows + row) * 16) = units[part];
      }
    }
  }
}

template <int tiles>
void multiply_few(const bf16* w, int64_t columns, const uint32_t* left, int64_t depth, int64_t rows, float* y,
                  int64_t ldy, const char* next) {
  alignas(64) uint32_t right[2][2 * kTile];
  alignas(64) float sums[2 * tiles * kTile];
  for (int64_t c = 0; c < columns; c += kWide) {
    const bool last = c + kWide == columns;
    clear<tiles>();
    for (int64_t k = 0; k < depth; k += kDeep) {
      uint32_t* b = right[k / kDeep % 2];
      const bf16* from = w + k * columns + c;
      const char* soon = last ? next + k * columns * 2 : reinterpret_cast<const char*>(from + kWide);
      for (int64_t j = 0; j < 16; ++j, from += columns, soon += columns * 2) {
        __builtin_prefetch(soon);
        __builtin_prefetch(soon + 32 * columns);
        interleave(from, from + 16 * columns, b + 16 * j, b + kTile + 16 * j);
      }
      __asm__ volatile("" ::: "memory");  // the compiler does not know that tiles are loaded from memory
      const uint32_t* x = left + k / kDeep * tiles * kTile;
      _tile_loadd(7, b, 64);
      ERNIE5_PASS(6, x, 0, 2, 4);
      _tile_loadd(7, b + kTile, 64);
      ERNIE5_PASS(6, x, 1, 3, 5);
    }
    take<tiles>(sums);
    __asm__ volatile("" ::: "memory");
    for (int64_t row = 0; row < rows; ++row) {
      for (int odd = 0; odd < 2; ++odd) {  // the smallest first
        f32x16 rest = line_of(sums, 2 * rows + row, odd) + line_of(sums, rows + row, odd);
        store(y + row * ldy + c + 16 * odd, rest + line_of(sums, row, odd));
      }
    }
  }
}

// y [rows, ldy] = x[., at .. at+depth) w; `next` is what this thread reads afterwards. False if it is not made for these
// sizes. The calling thread holds a MatrixUnit.
inline bool multiply_few(const bf16* w, int64_t columns, const float* const* x, int64_t at, int64_t depth, int64_t rows,
                         float* y, int64_t ldy, const void* next) {
  if (rows < kFew || rows > kMany || columns % kWide != 0 || depth % kDeep != 0) return false;
  auto* left = scratch<uint32_t, 120>(depth / kDeep * tiles_of(rows) * kTile);
  split_left(x, at, depth, rows, left);
  auto run = tiles_of(rows) == 1 ? multiply_few<1> : tiles_of(rows) == 2 ? multiply_few<2> : multiply_few<3>;
  run(w, columns, left, depth, rows, y, ldy, static_cast<const char*>(next));
  return true;
}

// ------------------------------------------------------------------------------------- weights [columns, depth]

// The parts of rows x [rows, ldx] as right tiles: neighbours along the summed axis share a unit, as in the weights.
inline void split_right(const float* x, int64_t ldx, int64_t depth, int64_t rows, uint32_t* to) {
  const int64_t tiles = tiles_of(rows);
  alignas(64) uint32_t lines[3 * kMany][16] = {};
  for (int64_t k = 0; k < depth; k += kDeep, to += tiles * kTile) {
    for (int64_t row = 0; row < rows; ++row) {
      f32x16 a = load(x + row * ldx + k), b = load(x + row * ldx + k + 16);
      u32x16 units[3];
      split(__builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30),
            __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31), units);
      for (int64_t part = 0; part < 3; ++part) {
        *reinterpret_cast<u32x16*>(lines[part * rows + row]) = units[part];
      }
    }
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const uint32_t* from[16];
      for (int i = 0; i < 16; ++i) from[i] = lines[16 * tile + i];
      transpose_quads(from, 4, to + tile * kTile, 16);
    }
  }
  __asm__ volatile("" ::: "memory");  // as in multiply_few
}

// out[row * ldo + c] for the kWide rows c of w [., depth], with what split_right made of x. Half of the rows at a time:
// those of the next half are asked for in the order in which they lie in memory.
template <int tiles>
void dot_few(const bf16* w, int64_t depth, const uint32_t* right, int64_t rows, float* out, int64_t ldo) {
  alignas(64) float sums[2 * tiles * kTile], turned[tiles * kTile];
  const size_t bytes = static_cast<size_t>(depth) * sizeof(bf16);
  const uint32_t* x = right;
  auto prefetch = [&](int64_t k) {
    for (int64_t line = 0; line < 16; ++line) __builtin_prefetch(w + 16 * (depth + k) + line * kDeep, 0, 2);
  };
  clear<tiles>();
  for (int64_t k = 0; k < depth; k += kDeep, x += tiles * kTile) {
    prefetch(k);
    _tile_loadd(6, w + k, bytes);
    ERNIE5_PASS(7, x, 0, 2, 4);
  }
  w += 16 * depth, x = right;
  for (int64_t k = 0; k < depth; k += kDeep, x += tiles * kTile) {
    prefetch(k);
    _tile_loadd(6, w + k, bytes);
    ERNIE5_PASS(7, x, 1, 3, 5);
  }
  take<tiles>(sums);
  __asm__ volatile("" ::: "memory");
  for (int64_t odd = 0; odd < 2; ++odd) {
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const uint32_t* from[16];
      for (int i = 0; i < 16; ++i) from[i] = reinterpret_cast<uint32_t*>(sums + (2 * tile + odd) * kTile + 16 * i);
      transpose_quads(from, 4, reinterpret_cast<uint32_t*>(turned + tile * kTile), 16);
    }
    for (int64_t row = 0; row < rows; ++row) {
      const float* lines = turned + row * 16;
      store(out + row * ldo + 16 * odd, load(lines + 2 * rows * 16) + load(lines + rows * 16) + load(lines));
    }
  }
}
inline void dot_few(const bf16* w, int64_t depth, const uint32_t* right, int64_t rows, float* out, int64_t ldo) {
  auto run = tiles_of(rows) == 1 ? dot_few<1> : tiles_of(rows) == 2 ? dot_few<2> : dot_few<3>;
  run(w, depth, right, rows, out, ldo);
}

#undef ERNIE5_PASS

}  // namespace amx
}  // namespace ernie5
#endif
