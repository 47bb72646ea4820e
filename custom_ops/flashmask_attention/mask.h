// Column intervals in one form, and what they say about a tile of query rows x key columns.
//
// Every (causal, bounds) combination becomes two intervals of hidden rows a column, [low_from, low_to) and
// [high_from, high_to), in rows of q. The least and greatest ends of each block of columns tell most tiles apart; the
// others are looked at column by column.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/simd.h"

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace ernie5 {
namespace flashmask {

constexpr int kRows = 64;   // query rows of a tile
constexpr int kKeys = 64;   // key columns of a tile
constexpr int kGroup = 8;   // rows of a micro-kernel
constexpr int kLanes = 16;  // columns of a vector
constexpr int kRowGroups = kRows / kGroup;
constexpr int kKeyVectors = kKeys / kLanes;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

inline i32x16 splat_int(int32_t v) { return v - i32x16{}; }
inline i32x16 load_int(const int32_t* p) { return *reinterpret_cast<const i32x16*>(p); }

// The two intervals of sixteen columns, or one column's sixteen times.
struct Ends {
  i32x16 low_from, low_to, high_from, high_to;
};

// Lanes of `seen` where the row is outside both intervals, lanes of `hidden` elsewhere.
inline f32x16 where_seen(i32x16 row, const Ends& ends, f32x16 seen, f32x16 hidden) {
#ifdef __AVX512F__
  __m512i r = (__m512i)row;
  __mmask16 low = _mm512_mask_cmplt_epi32_mask(_mm512_cmpge_epi32_mask(r, (__m512i)ends.low_from), r,
                                               (__m512i)ends.low_to);
  __mmask16 high = _mm512_mask_cmplt_epi32_mask(_mm512_cmpge_epi32_mask(r, (__m512i)ends.high_from), r,
                                                (__m512i)ends.high_to);
  return (f32x16)_mm512_mask_mov_ps((__m512)seen, static_cast<__mmask16>(low | high), (__m512)hidden);
#else
  i32x16 low = (row >= ends.low_from) & (row < ends.low_to), high = (row >= ends.high_from) & (row < ends.high_to);
  return (low | high) ? hidden : seen;
#endif
}

inline bool any(i32x16 v) {
#ifdef __AVX512F__
  return _mm512_test_epi32_mask((__m512i)v, (__m512i)v) != 0;
#else
  int32_t all = 0;
  for (int i = 0; i < kLanes; ++i) all |= v[i];
  return all != 0;
#endif
}

// Least and greatest ends over a block of kKeys columns.
struct BlockEnds {
  int32_t min_low_from, max_low_from, min_low_to, max_low_to;
  int32_t min_high_from, max_high_from, min_high_to, max_high_to;
};

enum class Sight { kNone, kAll, kSome };

// What each group of kGroup rows sees of a tile: bit c = some pair with columns [16 c, 16 c + 16).
struct Alive {
  uint32_t groups[kRowGroups];
};

// First and last + 1 of the bits set, {0, 0} for none.
struct Span {
  int first, last;
};
inline Span span_of(uint32_t bits) {
  if (bits == 0) return {0, 0};
  return {__builtin_ctz(bits), 32 - __builtin_clz(bits)};
}

// The columns of one (batch item, mask head), padded to whole blocks with columns that no row sees.
class Mask {
 public:
  Mask() = default;
  // `planes` holds 4 * padded columns, `blocks` one entry a block; both are filled by build().
  Mask(int32_t* planes, BlockEnds* blocks, int64_t columns, int64_t rows)
      : low_from_(planes),
        padded_(round_up(columns, kKeys)),
        columns_(columns),
        rows_(static_cast<int32_t>(rows)),
        blocks_(blocks) {}

  void build(const int32_t* intervals, int64_t bounds, bool causal, int64_t query_start) {
    for (int64_t j = 0; j < padded_; ++j) set(j, intervals, bounds, causal, query_start);
    for (int64_t block = 0; block < padded_ / kKeys; ++block) summarise(block);
  }

  // What rows [begin, end) see of a block: kAll only if all kRows rows are there. Fills `alive` when it is kSome.
  Sight look(int64_t block, int32_t begin, int32_t end, Alive* alive) const {
    const BlockEnds& b = blocks_[block];
    if ((b.max_low_from <= begin && b.min_low_to >= end) || (b.max_high_from <= begin && b.min_high_to >= end)) {
      return Sight::kNone;
    }
    bool all = (b.max_low_to <= begin || b.min_low_from >= end) && (b.max_high_to <= begin || b.min_high_from >= end);
    if (all && end - begin == kRows) return Sight::kAll;
    uint32_t any_alive = 0;
    for (uint32_t& group : alive->groups) group = 0;
    for (int vector = 0; vector < kKeyVectors; ++vector) {
      Ends ends = of_vector(block * kKeys + vector * kLanes);
      int32_t from = begin;
      for (int group = 0; group < kRowGroups && from < end; ++group, from += kGroup) {
        i32x16 first = splat_int(from), last = splat_int(std::min(from + kGroup, end));
        i32x16 dead = ((ends.low_from <= first) & (ends.low_to >= last)) |
                      ((ends.high_from <= first) & (ends.high_to >= last));
        if (any(~dead)) alive->groups[group] |= 1u << vector;
      }
    }
    for (uint32_t group : alive->groups) any_alive |= group;
    return any_alive != 0 ? Sight::kSome : Sight::kNone;
  }

  Ends of_vector(int64_t column) const {
    const int32_t* p = low_from_ + column;
    return {load_int(p), load_int(p + padded_), load_int(p + 2 * padded_), load_int(p + 3 * padded_)};
  }
  Ends of_column(int64_t column) const {
    const int32_t* p = low_from_ + column;
    return {splat_int(p[0]), splat_int(p[padded_]), splat_int(p[2 * padded_]), splat_int(p[3 * padded_])};
  }

 private:
  void set(int64_t j, const int32_t* intervals, int64_t bounds, bool causal, int64_t query_start) {
    int64_t low_from = query_start, low_to = query_start + rows_, high_from = low_to, high_to = query_start;
    if (j < columns_) {
      const int32_t* values = intervals + j * bounds;
      bool ends = causal ? bounds == 2 : bounds == 4;
      low_from = values[0];
      if (ends) low_to = values[1];
      high_from = bounds == 4 ? values[2] : query_start;
      high_to = causal ? j : values[bounds - 1];
    }
    // An interval without rows goes where it disturbs the least and greatest ends of its block the least.
    int32_t from = clip(low_from - query_start), to = clip(low_to - query_start);
    if (from >= to) from = to = rows_;
    low_from_[j] = from;
    low_from_[padded_ + j] = to;
    from = clip(high_from - query_start), to = clip(high_to - query_start);
    if (from >= to) from = to = 0;
    low_from_[2 * padded_ + j] = from;
    low_from_[3 * padded_ + j] = to;
  }
  int32_t clip(int64_t row) const {
    return static_cast<int32_t>(row < 0 ? 0 : row > rows_ ? rows_ : row);
  }

  void summarise(int64_t block) {
    const int32_t* p = low_from_ + block * kKeys;
    int32_t least[4], greatest[4];
    for (int plane = 0; plane < 4; ++plane, p += padded_) {
      auto range = std::minmax_element(p, p + kKeys);
      least[plane] = *range.first, greatest[plane] = *range.second;
    }
    blocks_[block] = {least[0], greatest[0], least[1], greatest[1], least[2], greatest[2], least[3], greatest[3]};
  }

  int32_t* low_from_ = nullptr;
  int64_t padded_ = 0, columns_ = 0;
  int32_t rows_ = 0;
  BlockEnds* blocks_ = nullptr;
};

}  // namespace flashmask
}  // namespace ernie5
