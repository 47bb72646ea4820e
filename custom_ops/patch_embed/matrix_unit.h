// Tokens of a video of bytes on the matrix unit (AMX).
//
// A byte less 128 is exact in bf16, so a patch needs no float: of (v / 255 - mean) / deviation the factor goes into the
// weight, and the summand, times the weight, is where every sum starts. The weight is the sum of three bf16, exactly (see
// common/matrix_gemm.h), which makes three products for one of floats, all of them exact before they are summed.
#pragma once

#include <vector>

#include "common/matrix_gemm.h"
#include "patch_embed/video.h"

namespace ernie5 {
namespace patch_embed {

#if defined(ERNIE5_AMX)
constexpr int64_t kMiddle = 128;
constexpr int64_t kBlockRows = 512, kBlockUnits = 320 * 1024;  // at most, of the patches that a task holds
constexpr int kWeightParts = 3;

// The right operand: strips of two tiles of columns (the last may be one), each [depth / 32][parts, smallest first]
// [tiles], and for every span what its sums start with.
class TileWeight {
 public:
  template <class Real>
  TileWeight(const Sizes& s, const std::vector<Span>& spans, const Real* weight, const Real* bias, const float* mean,
             const float* deviation)
      : s_(s), columns_(round_up(s.D, 32)), deep_(divide_up(s.K, amx::kDeep)) {
    units_ = scratch<uint32_t, kStripsSlot>(strips() * deep_ * kStep);
    starts_ = scratch<float, kSumsSlot>(static_cast<int64_t>(spans.size()) * columns_);
    float *scale = scratch<float, kVectorsSlot>(2 * s.K), *shift = scale + s.K;
    for (int64_t k = 0, c = 0; k < s.K; ++k, c = c + 1 < s.C ? c + 1 : 0) {
      const double spread = deviation[c];
      scale[k] = static_cast<float>(1.0 / (255.0 * spread));
      shift[k] = static_cast<float>((kMiddle / 255.0 - mean[c]) / spread);
    }
    parallel_for(strips(), [&](int64_t strip, int) {
      tiles(strip) == 2 ? pack<2>(weight, scale, strip) : pack<1>(weight, scale, strip);
      for (size_t i = 0; i < spans.size(); ++i) {
        for (int64_t column = 32 * strip; column < 32 * strip + 32; column += 16) {
          start(spans[i], weight, bias, shift, column, starts_ + static_cast<int64_t>(i) * columns_ + column);
        }
      }
    });
  }
  int64_t strips() const { return columns_ / 32; }
  int tiles(int64_t strip) const { return s_.D - 32 * strip > 16 ? 2 : 1; }
  const uint32_t* data(int64_t strip, int64_t first) const {
    return units_ + strip * deep_ * kStep + first * tiles(strip) * kWeightParts * amx::kTile;
  }
  const float* start(size_t span, int64_t strip) const {
    return starts_ + static_cast<int64_t>(span) * columns_ + 32 * strip;
  }

 private:
  static constexpr int64_t kStep = 2 * kWeightParts * amx::kTile;

  template <int tiles, class Real>
  void pack(const Real* weight, const float* scale, int64_t strip) const {
    uint32_t* to = units_ + strip * deep_ * kStep;
    for (int64_t k = 0; k < s_.K; k += amx::kDeep, to += tiles * kWeightParts * amx::kTile) {
      for (int64_t j = 0; j < 16; ++j) {
        for (int tile = 0; tile < tiles; ++tile) {
          auto row = [&](int64_t k, int64_t column) {
            return k < s_.K ? get(weight + k * s_.D + column, s_.D - column) * scale[k] : f32x16{};
          };
          const int64_t column = 32 * strip + 16 * tile;
          u32x16 parts[kWeightParts];
          amx::split(row(k + 2 * j, column), row(k + 2 * j + 1, column), parts);
          for (int part = 0; part < kWeightParts; ++part) {
            uint32_t* line = to + ((kWeightParts - 1 - part) * tiles + tile) * amx::kTile + 16 * j;
            *reinterpret_cast<u32x16*>(line) = parts[part];
          }
        }
      }
    }
  }

  template <class Real>
  void start(const Span& span, const Real* weight, const Real* bias, const float* shift, int64_t column,
             float* to) const {
    const int64_t count = s_.D - column;
    f32x16 sum = {};
    for (int64_t k = span.first_run * s_.run; k < span.last_run * s_.run && count > 0; ++k) {
      sum += get(weight + k * s_.D + column, count) * shift[k];
    }
    store(to, sum + get(bias + column, count));
  }

  const Sizes& s_;
  int64_t columns_, deep_;
  uint32_t* units_;
  float* starts_;
};

typedef uint16_t u16x32 __attribute__((vector_size(64)));

// 32 bytes less 128 as bf16; where `present` has no bit nothing is read, and -128 stands.
inline __m512i centred(const uint8_t* p, __mmask32 present) {
  const __m256i v = _mm256_xor_si256(_mm256_maskz_loadu_epi8(present, p), _mm256_set1_epi8(-128));
  auto wide = [](__m128i half) {
    return _mm512_castps_si512(_mm512_maskz_cvtepi32_ps(0xffff, _mm512_maskz_cvtepi8_epi32(0xffff, half)));
  };
  u16x32 upper_halves;
  for (int i = 0; i < 32; ++i) upper_halves[i] = static_cast<uint16_t>(2 * i + 1);
  return _mm512_permutex2var_epi16(wide(_mm256_castsi256_si128(v)), (__m512i)upper_halves,
                                   wide(_mm256_extracti128_si256(v, 1)));
}

// The patches of a span as left operand: a line a patch, of those 32 values at a time that its frames lie in.
class Lines {
 public:
  Lines(const Sizes& s, const Span& span, const uint8_t* video)
      : s_(s), span_(span), video_(video), first_(span.first_run * s.run), last_(span.last_run * s.run) {}
  int64_t first() const { return first_ / amx::kDeep; }
  int64_t deep() const { return divide_up(last_, amx::kDeep) - first(); }
  int64_t stride() const { return 2 * spread(16 * deep()); }  // values

  // The patch whose first value is number `value`. May write 32 values more.
  void read(int64_t value, uint16_t* to) const {
    const int64_t full = s_.run / 32, next_frame = (s_.H - s_.ph) * s_.line;
    const __mmask32 rest = (1u << s_.run % 32) - 1;
    int64_t row = span_.first_run % s_.ph;
    const uint8_t* from = video_ + value + (span_.first_run / s_.ph * s_.H + row) * s_.line;
    _mm512_storeu_si512(to, _mm512_setzero_si512());
    to += first_ % amx::kDeep;
    for (int64_t run = span_.first_run; run < span_.last_run; ++run) {
      for (int64_t i = 0; i < full; ++i) _mm512_storeu_si512(to + 32 * i, centred(from + 32 * i, ~0u));
      if (rest != 0) _mm512_storeu_si512(to + 32 * full, centred(from + 32 * full, rest));
      to += s_.run, from += s_.line;
      if (++row == s_.ph) row = 0, from += next_frame;
    }
    _mm512_storeu_si512(to, _mm512_setzero_si512());
  }

 private:
  const Sizes& s_;
  const Span& span_;
  const uint8_t* video_;
  int64_t first_, last_;
};

// sums [32][32] = start + 32 lines, `stride` values apart, times a strip of `tiles` tiles of columns.
template <int tiles>
void multiply_lines(const uint16_t* lines, int64_t stride, int64_t deep, const uint32_t* b, const float* start,
                    float* sums) {
  const uint16_t* lower = lines + 16 * stride;
  const size_t bytes = static_cast<size_t>(stride) * sizeof(uint16_t);
  _tile_loadd(0, start, 0);
  _tile_loadd(2, start, 0);
  if constexpr (tiles == 2) {
    _tile_loadd(1, start + 16, 0);
    _tile_loadd(3, start + 16, 0);
  }
  for (int64_t k = 0; k < deep; ++k) {
    _tile_loadd(4, lines + 32 * k, bytes);
    _tile_loadd(5, lower + 32 * k, bytes);
#pragma GCC unroll 3
    for (int part = 0; part < kWeightParts; ++part, b += tiles * amx::kTile) {
      _tile_loadd(6, b, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (tiles == 2) {
        _tile_loadd(7, b + amx::kTile, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
  }
  _tile_stored(0, sums, 128);
  _tile_stored(2, sums + 16 * 32, 128);
  if constexpr (tiles == 2) {
    _tile_stored(1, sums + 16, 128);
    _tile_stored(3, sums + 16 * 32 + 16, 128);
  }
  __asm__ volatile("" ::: "memory");  // the compiler does not know that tiles are stored to memory
}

// Some consecutive patches of a span, to be done by one task.
struct Block {
  size_t span;
  int64_t first, rows;
};

template <class Real>
void embed_block(const Sizes& s, const Span& span, const Block& block, const TileWeight& weight, const uint8_t* video,
                 Real* tokens) {
  const Lines lines(s, span, video);
  const int64_t stride = lines.stride(), rows = round_up(block.rows, 32);
  auto* left = scratch<uint16_t, kPanelSlot>(rows * stride + 32);
  auto** out = scratch<Real*, kRowSlot>(rows);
  Cursor cursor(s, span, block.first);
  for (int64_t i = 0; i < block.rows; ++i, cursor.next()) {
    lines.read(cursor.value(), left + i * stride);
    out[i] = tokens + cursor.token() * s.D;
  }
  __asm__ volatile("" ::: "memory");  // nor that they are loaded from there
  alignas(64) float sums[32 * 32];
  for (int64_t strip = 0; strip < weight.strips(); ++strip) {
    const uint32_t* b = weight.data(strip, lines.first());
    const float* start = weight.start(block.span, strip);
    const int64_t column = 32 * strip, count = s.D - column;
    for (int64_t m = 0; m < block.rows; m += 32) {
      const auto multiply = weight.tiles(strip) == 2 ? multiply_lines<2> : multiply_lines<1>;
      multiply(left + m * stride, stride, lines.deep(), b, start, sums);
      for (int64_t i = 0; i < smaller(32, block.rows - m); ++i) {
        put(out[m + i] + column, load(sums + 32 * i), count);
        put(out[m + i] + column + 16, load(sums + 32 * i + 16), count - 16);
      }
    }
  }
}

// tokens = patches times weight + bias; false if there is no matrix unit.
template <class Real>
bool embed_on_matrix_unit(const Sizes& s, const uint8_t* video, const Real* weight, const Real* bias, const float* mean,
                          const float* deviation, Real* tokens) {
  if (!amx::available()) return false;
  const std::vector<Span> spans = make_spans(s);
  const TileWeight right(s, spans, weight, bias, mean, deviation);
  std::vector<Block> blocks;
  for (size_t i = 0; i < spans.size(); ++i) {
    const int64_t units = Lines(s, spans[i], video).stride() / 2, tokens_here = spans[i].tokens;
    const int64_t most = smaller(kBlockRows, larger(kBlockUnits / units, 32));
    const int64_t count = round_up(divide_up(tokens_here, most), num_threads());
    const int64_t rows = round_up(divide_up(tokens_here, count), 32);
    for (int64_t first = 0; first < tokens_here; first += rows) {
      blocks.push_back({i, first, smaller(rows, tokens_here - first)});
    }
  }
  parallel_for(static_cast<int64_t>(blocks.size()), [&](int64_t task, int) {
    MatrixUnit unit;
    const Block& block = blocks[static_cast<size_t>(task)];
    embed_block(s, spans[block.span], block, right, video, tokens);
  });
  return true;
}
#else
template <class Real>
bool embed_on_matrix_unit(const Sizes&, const uint8_t*, const Real*, const Real*, const float*, const float*, Real*) {
  return false;
}
#endif

}  // namespace patch_embed
}  // namespace ernie5
