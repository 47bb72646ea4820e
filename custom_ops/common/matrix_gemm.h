// Large matrix products on the matrix unit (AMX), for bf16 and for float.
//
// A float is the sum of three bf16, exactly: 8 + 8 + 8 bits of its 24. Of the nine products of two such sums the six
// largest are computed; what is left out is below 2^-24 of a product, so the result is as good as one of float products
// summed in float. The unit is sixteen times as fast as the vectors are with floats, so six products still pay.
// (Infinities become NaN: the parts of one are an infinity and its difference from itself.)
//
// Both operands are packed in blocks that fit into the second-level cache: tiles of 16 rows (or columns) by 32 values
// of the summed axis, the parts of a float one after the other. Sums of a block stay in memory of the thread, as tiles.
#pragma once

#include "common/gemm.h"

namespace ernie5 {

#if defined(ERNIE5_AMX)
namespace amx {

constexpr int64_t kTile = 256;  // units of 32 bits in a tile: 16 lines of 16
constexpr int64_t kDeep = 32;   // values of the summed axis in a tile
template <class T>
constexpr int kParts = std::is_same_v<T, float> ? 3 : 1;

// Two values in a unit: `first` in its lower half.
inline void split(f32x16 first, f32x16 second, u32x16 (&out)[3]) {
#pragma GCC unroll 3
  for (int part = 0; part < 3; ++part) {
    u32x16 a = (u32x16)first, b = (u32x16)second;
    if (part < 2) a += 0x8000u, b += 0x8000u;  // to nearest; what is left at last fits
    out[part] = (a >> 16) | (b & 0xffff0000u);
    first -= as_float(a & 0xffff0000u), second -= as_float(b & 0xffff0000u);
  }
}

// 32 values of a line along the summed axis. Which two share a unit may be chosen, alike for both operands: for float
// j and j + 16, for bf16 neighbours.
inline void units_along(const float* p, int64_t count, u32x16 (&out)[3]) {
  if (count >= kDeep) return split(load(p), load(p + 16), out);
  split(load_part(p, std::min<int64_t>(16, count)), load_part(p + 16, std::max<int64_t>(0, count - 16)), out);
}
inline void units_along(const bf16* p, int64_t count, u32x16 (&out)[1]) {
  out[0] = u32x16{};
  std::memcpy(&out[0], p, static_cast<size_t>(std::min(kDeep, count)) * sizeof(bf16));
}

// Unit j of `count` lines across the summed axis, whose rows begin at `from`: rows j and j + 16, or 2 j and 2 j + 1.
inline void units_across(Rows<float> from, int64_t rows, int64_t j, int64_t column, int64_t count, u32x16 (&out)[3]) {
  f32x16 first{}, second{};
  if (j < rows) first = count >= 16 ? load(from[j] + column) : load_part(from[j] + column, count);
  if (j + 16 < rows) second = count >= 16 ? load(from[j + 16] + column) : load_part(from[j + 16] + column, count);
  split(first, second, out);
}
inline void units_across(Rows<bf16> from, int64_t rows, int64_t j, int64_t column, int64_t count, u32x16 (&out)[1]) {
  out[0] = interleave(2 * j < rows ? bits_part(from[2 * j] + column, count) : u16x16{},
                      2 * j + 1 < rows ? bits_part(from[2 * j + 1] + column, count) : u16x16{});
}

// An operand's lines [.., lines) x values [0, depth) of the summed axis, which lies `along` the rows of `from` or
// across them. The left operand wants a line in a line of a tile, the right one in a column. Tiles of 16 lines begin
// `block` units apart; an even number of them is written.
template <class T>
void pack(Rows<T> from, bool along, bool right, int64_t lines, int64_t depth, int64_t block, uint32_t* to) {
  constexpr int parts = kParts<T>;
  alignas(64) uint32_t turned[parts][kTile];
  const uint32_t* rows[parts][16];
  for (int part = 0; part < parts; ++part) {
    for (int i = 0; i < 16; ++i) rows[part][i] = turned[part] + 16 * i;
  }
  const bool turn = along == right;
  const int64_t tiles = round_up(lines, 32) / 16;
  auto one = [&](int64_t tile, int64_t k, uint32_t* tile_at) {
    u32x16 units[parts];
    for (int64_t i = 0; i < 16; ++i) {
      if (along) {
        const int64_t line = 16 * tile + i;
        if (line < lines) units_along(from[line] + k, depth - k, units);
        else for (auto& part : units) part = u32x16{};
      } else {
        const int64_t count = std::max<int64_t>(0, std::min<int64_t>(16, lines - 16 * tile));
        units_across(from.from(k), depth - k, i, 16 * tile, count, units);
      }
      for (int part = 0; part < parts; ++part) {
        uint32_t* line_at = (turn ? turned[part] : tile_at + part * kTile) + 16 * i;
        *reinterpret_cast<u32x16*>(line_at) = units[part];
      }
    }
    if (!turn) return;
    for (int part = 0; part < parts; ++part) transpose_quads(rows[part], 4, tile_at + part * kTile, 16);
  };
  if (along) {
    for (int64_t tile = 0; tile < tiles; ++tile) {
      for (int64_t k = 0; k < depth; k += kDeep) one(tile, k, to + tile * block + k / kDeep * parts * kTile);
    }
  } else {
    for (int64_t k = 0; k < depth; k += kDeep) {
      for (int64_t tile = 0; tile < tiles; ++tile) one(tile, k, to + tile * block + k / kDeep * parts * kTile);
    }
  }
}

// The same two tiles of the left or of the right operand, of one part; all four products of what is there.
#define ERNIE5_LEFT(part)                  \
  _tile_loadd(4, a0 + (part) * kTile, 64); \
  if constexpr (both) _tile_loadd(5, a1 + (part) * kTile, 64)
#define ERNIE5_RIGHT(part)                 \
  _tile_loadd(6, b0 + (part) * kTile, 64); \
  _tile_loadd(7, b1 + (part) * kTile, 64)
#define ERNIE5_MULTIPLY()    \
  _tile_dpbf16ps(0, 4, 6);   \
  _tile_dpbf16ps(1, 4, 7);   \
  if constexpr (both) {      \
    _tile_dpbf16ps(2, 5, 6); \
    _tile_dpbf16ps(3, 5, 7); \
  }                          \
  if constexpr (ahead) {     \
    for (int64_t line = 0; line < burst; ++line) __builtin_prefetch(soon, 0, 2), soon += 64; \
  }
template <class T>
constexpr int64_t kMultiplies = std::is_same_v<T, float> ? 6 : 1;  // in a step of 32 values of the summed axis

// sums (2 x 2 tiles, one after the other) = or, if `more`, += the product of two left and two right tiles' lines; of
// the first left one alone if not `both`. `ahead`: asks for `burst` lines from `soon` on beside every multiplication.
template <int parts, bool both, bool ahead>
inline void square(const uint32_t* a0, const uint32_t* a1, const uint32_t* b0, const uint32_t* b1, int64_t deep,
                   bool more, float* sums, const char* soon, int64_t burst) {
  if (more) {
    _tile_loadd(0, sums, 64);
    _tile_loadd(1, sums + kTile, 64);
    if constexpr (both) {
      _tile_loadd(2, sums + 2 * kTile, 64);
      _tile_loadd(3, sums + 3 * kTile, 64);
    }
  } else {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (both) {
      _tile_zero(2);
      _tile_zero(3);
    }
  }
  for (int64_t k = 0; k < deep; ++k) {
    ERNIE5_LEFT(0);
    if constexpr (parts == 3) {
      ERNIE5_RIGHT(2);
      ERNIE5_MULTIPLY();
      ERNIE5_RIGHT(1);
      ERNIE5_MULTIPLY();
    }
    ERNIE5_RIGHT(0);
    ERNIE5_MULTIPLY();
    if constexpr (parts == 3) {
      ERNIE5_LEFT(2);
      ERNIE5_MULTIPLY();
      ERNIE5_LEFT(1);
      ERNIE5_MULTIPLY();
      ERNIE5_RIGHT(1);
      ERNIE5_MULTIPLY();
    }
    a0 += parts * kTile, a1 += parts * kTile, b0 += parts * kTile, b1 += parts * kTile;
  }
  _tile_stored(0, sums, 64);
  _tile_stored(1, sums + kTile, 64);
  if constexpr (both) {
    _tile_stored(2, sums + 2 * kTile, 64);
    _tile_stored(3, sums + 3 * kTile, 64);
  }
}
#undef ERNIE5_LEFT
#undef ERNIE5_RIGHT
#undef ERNIE5_MULTIPLY

constexpr int64_t kRowsAtOnce = 512, kColumnsAtOnce = 512;
template <class T>
constexpr int64_t kDepthAtOnce = std::is_same_v<T, float> ? 128 : 512;

// Rows [m0, m1) and columns [n0, n1) of C, the sum of the terms, written past the caches if `through`. `ahead` is asked
// for meanwhile.
template <class T>
void block_product(Form form, const std::vector<Term<T>>& terms, int64_t m0, int64_t m1, int64_t n0, int64_t n1, T* c,
                   int64_t ldc, bool through, Ahead& ahead) {
  constexpr int parts = kParts<T>;
  constexpr int64_t depth_most = kDepthAtOnce<T>;
  const int64_t rows = m1 - m0, columns = n1 - n0, down = round_up(rows, 32), across = round_up(columns, 32);
  const int64_t block = depth_most / kDeep * parts * kTile;
  auto* left = scratch<uint32_t, 110>(down / 16 * block);
  auto* right = scratch<uint32_t, 111>(across / 16 * block);
  auto* sums = scratch<float, 112>(down * across);
  bool more = false;
  for (const auto& [a, b, K] : terms) {
    for (int64_t k0 = 0; k0 < K; k0 += depth_most) {
      const int64_t depth = std::min(depth_most, K - k0), deep = divide_up(depth, kDeep);
      const bool a_along = form != Form::TN, b_along = form == Form::NT;
      pack(a_along ? a.from(m0).column(k0) : a.from(k0).column(m0), a_along, false, rows, depth, block, left);
      pack(b_along ? b.from(n0).column(k0) : b.from(k0).column(n0), b_along, true, columns, depth, block, right);
      __asm__ volatile("" ::: "memory");  // the compiler does not know that tiles are loaded from memory
      for (int64_t n = 0; n < across; n += 32) {
        const uint32_t* b0 = right + n / 16 * block;
        for (int64_t m = 0; m < down; m += 32) {
          const uint32_t* a0 = left + m / 16 * block;
          const char* soon = ahead.burst > 0 ? ahead.take_lines(ahead.burst * deep * kMultiplies<T>) : nullptr;
          auto one = [&](auto both, auto asks) {
            square<parts, both.value, asks.value>(a0, a0 + block, b0, b0 + block, deep, more, sums + n * down + m * 32,
                                                  soon, ahead.burst);
          };
          const std::true_type yes;
          const std::false_type no;
          if (rows - m > 16) soon != nullptr ? one(yes, yes) : one(yes, no);
          else soon != nullptr ? one(no, yes) : one(no, no);
        }
      }
      more = true;
    }
  }
  if (!more) std::memset(sums, 0, static_cast<size_t>(down * across) * sizeof(float));
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; j += 16) {
      const float* from = sums + j / 32 * 32 * down + i / 32 * 1024 + i % 32 / 16 * 512 + j % 32 / 16 * 256 + i % 16 * 16;
      put_through(c + (m0 + i) * ldc + n0 + j, load(from), std::min<int64_t>(16, columns - j), through);
    }
  }
}

}  // namespace amx
#endif

// Whether matrix_gemm works here.
inline bool has_matrix_unit() {
#if defined(ERNIE5_AMX)
  return amx::available();
#else
  return false;
#endif
}

// C [M,N] = A B as `gemm` does it, on the matrix unit; false if there is none, or too little to do for it.
template <class T>
bool matrix_gemm([[maybe_unused]] Form form, [[maybe_unused]] int64_t M, [[maybe_unused]] int64_t N,
                 [[maybe_unused]] int64_t K, [[maybe_unused]] Rows<T> a, [[maybe_unused]] Rows<T> b,
                 [[maybe_unused]] T* c, [[maybe_unused]] int64_t ldc) {
#if defined(ERNIE5_AMX)
  if (!amx::available() || M < 16 || N < 16 || K < 16) return false;
  // Equal blocks, as many as divide evenly among the threads.
  int64_t down = divide_up(M, amx::kRowsAtOnce), across = divide_up(N, amx::kColumnsAtOnce);
  const int64_t threads = num_threads();
  while (down * across % threads != 0 && down * across < 8 * threads && (M / down > 64 || N / across > 64)) {
    M / down >= N / across ? ++down : ++across;
  }
  const int64_t height = round_up(divide_up(M, down), 32), width = round_up(divide_up(N, across), 32);
  down = divide_up(M, height), across = divide_up(N, width);
  parallel_for(down * across, [&](int64_t task, int) {
    MatrixUnit unit;
    const int64_t m0 = task % down * height, n0 = task / down * width;
    Ahead none;
    amx::block_product(form, {{a, b, K}}, m0, std::min(M, m0 + height), n0, std::min(N, n0 + width), c, ldc, false, none);
  });
  return true;
#else
  return false;
#endif
}

// The same for the calling thread alone, which holds `unit`: sums of float products, none of whose sizes is small.
template <class T>
bool thread_gemm([[maybe_unused]] const MatrixUnit& unit, [[maybe_unused]] Form form, [[maybe_unused]] int64_t M,
                 [[maybe_unused]] int64_t N, [[maybe_unused]] const std::vector<Term<T>>& terms, [[maybe_unused]] T* c,
                 [[maybe_unused]] int64_t ldc, [[maybe_unused]] bool through, [[maybe_unused]] Ahead& ahead) {
#if defined(ERNIE5_AMX)
  if constexpr (std::is_same_v<T, float>) {
    constexpr int64_t kRows = amx::kRowsAtOnce, kColumns = amx::kColumnsAtOnce;
    int64_t depth = 0;
    for (const Term<T>& term : terms) depth += term.K;
    if (!unit.on || std::min({M, N, depth}) < 64) return false;  // packing would cost more than is saved
    for (int64_t m = 0; m < M; m += kRows) {
      for (int64_t n = 0; n < N; n += kColumns) {
        amx::block_product(form, terms, m, std::min(M, m + kRows), n, std::min(N, n + kColumns), c, ldc, through, ahead);
      }
    }
    return true;
  }
#endif
  return false;
}
template <class T>
bool thread_gemm(const MatrixUnit& unit, Form form, int64_t M, int64_t N, int64_t K, Rows<T> a, Rows<T> b, T* c,
                 int64_t ldc, bool through, Ahead& ahead) {
  return thread_gemm<T>(unit, form, M, N, {{a, b, K}}, c, ldc, through, ahead);
}

}  // namespace ernie5
