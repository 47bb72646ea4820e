// Tokens of a video of bytes on the matrix unit (AMX).
//
// A byte less a whole number of 0 .. 255 is exact in bf16. The one nearest to the mean is taken, so that sums hardly
// cancel; of (v / 255 - mean) / deviation the factor then goes into the weight, and the small summand that is left,
// times the weight, is where every sum starts. The weight is the sum of three bf16, exactly (common/matrix_gemm.h),
// which makes three products for one of floats, all of them exact before they are summed.
#pragma once

#include <cmath>
#include <vector>

#include "common/matrix_gemm.h"
#include "patch_embed/video.h"

namespace ernie5 {
namespace patch_embed {

#if defined(ERNIE5_AMX)
constexpr int64_t kBlockRows = 512, kBlockUnits = 320 * 1024;  // at most, of the patches that a task holds
constexpr int64_t kTurnRows = 64, kSmallWeight = 16 * 1024;    // rows between two readings of a weight of so few units
constexpr int64_t kCached = 2 << 20;  // bytes of tokens that may stay in a cache until somebody reads them
constexpr int kWeightParts = 3;

// What is done to each value of a patch: (v - centre) * scale + shift. Zeros follow, for whole tiles and a vector.
struct Channels {
  float *centre, *scale, *shift;
  uint8_t* nothing;  // the bytes that count as zero but for `shift`
  Channels(const Sizes& s, const float* mean, const float* deviation) {
    const int64_t count = round_up(s.K, amx::kDeep) + 32;
    centre = scratch<float, kVectorsSlot>(3 * count), scale = centre + count, shift = scale + count;
    nothing = scratch<uint8_t, kVectorsSlot>(count);
    for (int64_t k = 0, c = 0; k < count; ++k, c = c + 1 < s.C ? c + 1 : 0) {
      if (k >= s.K) {
        centre[k] = scale[k] = shift[k] = nothing[k] = 0;
        continue;
      }
      const double middle = mean[c] > 0 ? std::min(255.0, std::floor(255.0 * mean[c] + 0.5)) : 0.0;
      centre[k] = static_cast<float>(middle), nothing[k] = static_cast<uint8_t>(middle);
      scale[k] = static_cast<float>(1.0 / (255.0 * deviation[c]));
      shift[k] = static_cast<float>((middle / 255.0 - mean[c]) / deviation[c]);
    }
  }
};

// The right operand: strips of two tiles of columns (the last may be one), each [depth / 32][parts, smallest first]
// [tiles], and for every span what its sums start with.
class TileWeight {
 public:
  template <class Real>
  TileWeight(const Sizes& s, const std::vector<Span>& spans, const Real* weight, const Real* bias,
             const Channels& channels)
      : s_(s), columns_(round_up(s.D, 32)), deep_(divide_up(s.K, amx::kDeep)) {
    units_ = scratch<uint32_t, kStripsSlot>(strips() * deep_ * kStep);
    starts_ = scratch<float, kSumsSlot>(static_cast<int64_t>(spans.size()) * columns_);
    parallel_for(strips(), [&](int64_t strip, int) {
      tiles(strip) == 2 ? pack<2>(weight, channels.scale, strip) : pack<1>(weight, channels.scale, strip);
      for (size_t i = 0; i < spans.size(); ++i) {
        for (int64_t column = 32 * strip; column < 32 * strip + 32; column += 16) {
          start(spans[i], weight, bias, channels.shift, column, starts_ + static_cast<int64_t>(i) * columns_ + column);
        }
      }
    });
  }
  int64_t strips() const { return columns_ / 32; }
  bool small() const { return strips() * deep_ * kStep <= kSmallWeight; }
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

// 32 bytes less `centre` as bf16.
inline __m512i centred(const uint8_t* p, const float* centre) {
  const f32x16 first = load(p) - load(centre), second = load(p + 16) - load(centre + 16);
  u16x32 upper_halves;
  for (int i = 0; i < 32; ++i) upper_halves[i] = static_cast<uint16_t>(2 * i + 1);
  return _mm512_permutex2var_epi16((__m512i)first, (__m512i)upper_halves, (__m512i)second);
}

// The patches of a span as left operand: a line a patch, of those 32 values at a time that its frames lie in.
class Lines {
 public:
  Lines(const Sizes& s, const Span& span, const uint8_t* video, const Channels& channels)
      : s_(s), video_(video), channels_(channels), first_(span.first_run * s.run), last_(span.last_run * s.run) {
    for (int64_t run = span.first_run; run < span.last_run; ++run) {
      starts_.push_back((run / s.ph * s.H + run % s.ph) * s.line);
    }
  }
  int64_t first() const { return first_ / amx::kDeep; }
  int64_t deep() const { return divide_up(last_, amx::kDeep) - first(); }
  int64_t stride() const { return 2 * spread(16 * deep()); }  // values

  // `count` patches, 32 at most, from where the cursor stands; also where their tokens belong.
  void read(Cursor& cursor, int64_t count, uint16_t* to, int64_t* tokens) const {
    const int64_t bytes = amx::kDeep * deep(), pitch = bytes + 32, stride = this->stride();
    const float* centre = channels_.centre + amx::kDeep * first();
    auto* gathered = scratch<uint8_t, kRowSlot>(32 * pitch);
    for (int64_t i = 0; i < count;) {
      const int64_t neighbours = smaller(count - i, cursor.row_left());
      gather(video_ + cursor.value(), neighbours, gathered + i * pitch, pitch);
      for (int64_t token = cursor.token(), end = i + neighbours; i < end; ++i) tokens[i] = token++;
      cursor.next(neighbours);
    }
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t k = 0; k < bytes; k += 32) {
        _mm512_storeu_si512(to + i * stride + k, centred(gathered + i * pitch + k, centre + k));
      }
    }
  }

 private:
  // The bytes of `count` patches side by side and, where frames are missing, those that count as zero. (Behind the last
  // value of a whole patch the weight is zero.) A vector may reach into bytes that are written later, or into the 32
  // between two patches.
  void gather(const uint8_t* patch, int64_t count, uint8_t* to, int64_t pitch) const {
    const int64_t length = s_.run, full = length / 32 * 32;
    const __mmask32 rest = (1u << length % 32) - 1;
    auto store = [](uint8_t* to, __m256i v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), v); };
    auto fill = [&](int64_t at, uint8_t* to) {
      const __m256i nothing = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(channels_.nothing + at));
      for (int64_t i = 0; i < count; ++i) store(to + i * pitch, nothing);
    };
    auto copy = [=](const uint8_t* from, __mmask32 present, uint8_t* to) {  // reads nothing that is not `present`
      for (int64_t i = 0; i < count; ++i, from += length, to += pitch) {
        store(to, _mm256_maskz_loadu_epi8(present, from));
      }
    };
    if (first_ % amx::kDeep != 0) fill(amx::kDeep * first(), to);
    to += first_ % amx::kDeep;
    for (const int64_t start : starts_) {
      const uint8_t* from = patch + start;
      for (int64_t k = 0; k < full; k += 32) copy(from + k, ~0u, to + k);
      if (rest != 0) copy(from + full, rest, to + full);
      to += length;
    }
    if (last_ < s_.K) fill(last_, to);
  }

  const Sizes& s_;
  const uint8_t* video_;
  const Channels& channels_;
  int64_t first_, last_;
  std::vector<int64_t> starts_;  // of the runs, from the first value of the patch
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

// Token places[i] = line i of `left` times the weight, for `rows` lines; written past the caches if `through`.
template <class Real>
void multiply_all(const Sizes& s, const Lines& lines, const uint16_t* left, const int64_t* places, int64_t rows,
                  const TileWeight& weight, size_t span, Real* tokens, bool through) {
  const int64_t stride = lines.stride(), deep = lines.deep();
  __asm__ volatile("" ::: "memory");  // the compiler does not know that tiles are loaded from memory
  alignas(64) float sums[32 * 32];
  for (int64_t strip = 0; strip < weight.strips(); ++strip) {
    const uint32_t* b = weight.data(strip, lines.first());
    const float* start = weight.start(span, strip);
    const int64_t column = 32 * strip, count = s.D - column;
    const auto multiply = weight.tiles(strip) == 2 ? multiply_lines<2> : multiply_lines<1>;
    for (int64_t m = 0; m < rows; m += 32) {
      multiply(left + m * stride, stride, deep, b, start, sums);
      for (int64_t i = 0; i < smaller(32, rows - m); ++i) {
        Real* to = tokens + places[m + i] * s.D + column;
        put_through(to, load(sums + 32 * i), count, through);
        put_through(to + 16, load(sums + 32 * i + 16), count - 16, through);
      }
    }
  }
}

// Some consecutive patches of a span, to be done by one task.
struct Block {
  size_t span;
  int64_t first, rows;
};

// Reads and multiplies a block by turns: often, so that tokens travel to memory meanwhile, but where the weight is
// large only once, since every turn reads all of it.
template <class Real>
void embed_block(const Sizes& s, const Span& span, const Block& block, const Channels& channels,
                 const TileWeight& weight, const uint8_t* video, Real* tokens, bool through) {
  const Lines lines(s, span, video, channels);
  const int64_t stride = lines.stride(), most = round_up(weight.small() ? kTurnRows : block.rows, 32);
  auto* left = scratch<uint16_t, kPanelSlot>(most * stride);
  auto* places = scratch<int64_t, kResultSlot>(most);
  Cursor cursor(s, span, block.first);
  for (int64_t done = 0; done < block.rows; done += most) {
    const int64_t rows = smaller(most, block.rows - done);
    for (int64_t m = 0; m < rows; m += 32) {
      lines.read(cursor, smaller(32, rows - m), left + m * stride, places + m);
    }
    multiply_all(s, lines, left, places, rows, weight, block.span, tokens, through);
  }
  if (through) _mm_sfence();
}

// tokens = patches times weight + bias; false if there is no matrix unit.
template <class Real>
bool embed_on_matrix_unit(const Sizes& s, const uint8_t* video, const Real* weight, const Real* bias, const float* mean,
                          const float* deviation, Real* tokens) {
  if (!amx::available()) return false;
  const std::vector<Span> spans = make_spans(s);
  const Channels channels(s, mean, deviation);
  const TileWeight right(s, spans, weight, bias, channels);
  std::vector<Block> blocks;
  for (size_t i = 0; i < spans.size(); ++i) {
    const int64_t units = Lines(s, spans[i], video, channels).stride() / 2, tokens_here = spans[i].tokens;
    const int64_t most = smaller(kBlockRows, larger(kBlockUnits / units, 32));
    const int64_t count = round_up(divide_up(tokens_here, most), num_threads());
    const int64_t rows = round_up(divide_up(tokens_here, count), 32);
    for (int64_t first = 0; first < tokens_here; first += rows) {
      blocks.push_back({i, first, smaller(rows, tokens_here - first)});
    }
  }
  const bool through = s.tokens() * s.D * static_cast<int64_t>(sizeof(Real)) > kCached;
  parallel_for(static_cast<int64_t>(blocks.size()), [&](int64_t task, int) {
    MatrixUnit unit;
    const Block& block = blocks[static_cast<size_t>(task)];
    embed_block(s, spans[block.span], block, channels, right, video, tokens, through);
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
