#include "patch_embed/patch_embed.h"

#include <cstring>
#include <utility>
#include <vector>

#include "patch_embed/matrix_unit.h"
#include "patch_embed/video.h"

namespace ernie5 {
namespace {

using namespace patch_embed;

// Accumulators of one register tile: kRows x kVectors vectors of 16 floats, so that they, the operands and nothing
// else fill the register file (32 registers of AVX-512, 16 of AVX2 with two for a vector).
#ifdef __AVX512F__
constexpr int kRows = 14, kVectors = 2;
#else
constexpr int kRows = 6, kVectors = 1;
#endif
constexpr int64_t kWidth = 16 * kVectors;    // columns of a strip
constexpr int64_t kPanelSize = 160 * 1024;   // floats of a block of rows that should stay in the second-level cache
constexpr int64_t kMostTiles = 16;           // tiles of one task
constexpr int64_t kGradBlock = 640 * 1024;   // floats of tokens_grad that are multiplied between two barriers
constexpr int64_t kGradDepth = 160;          // rows of weight_grad that one task computes
constexpr int64_t kRowBlock = 16;            // rows of patches that are read before they are laid out

// Copies rows of `count` floats, `stride` apart, into a tile laid out [count/16][rows][16]: one pointer then serves
// every row. (The rows should not have been written just before: vectors across stores in flight have to wait.)
inline void into_tile(const float* from, int64_t stride, int64_t count, int64_t rows, float* tile) {
  for (int64_t i = 0; i < count; i += 16) {
    for (int64_t r = 0; r < rows; ++r, tile += 16) store(tile, load(from + r * stride + i));
  }
}

template <int R, int V>
inline __attribute__((always_inline)) void add_products(const float* a, int64_t step, const float* b,
                                                         f32x16 (&sum)[R][V]) {
  f32x16 row[V];
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) row[v] = load(b + 16 * v);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sum[r][v] += row[v] * a[r * step];
  }
}

// out[r][0 .. width-1] = start + tile [R rows, depth] times b [depth, 16 V], rows of b being `stride` apart.
template <int R, int V, class Real>
void multiply_tile(const float* tile, const float* b, int64_t stride, int64_t depth, const float* start,
                   Real* const* out, int64_t column, int64_t width) {
  f32x16 sum[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sum[r][v] = load(start + 16 * v);
  }
  for (; depth >= 16; depth -= 16, tile += 16 * R) {
#pragma GCC unroll 4
    for (int k = 0; k < 16; ++k, b += stride) add_products<R, V>(tile + k, 16, b, sum);
  }
  for (int k = 0; k < depth; ++k, b += stride) add_products<R, V>(tile + k, 16, b, sum);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      int64_t left = width - 16 * v;
      if (left >= 16) {
        store(out[r] + column + 16 * v, sum[r][v]);
      } else if (left > 0) {
        store_part(out[r] + column + 16 * v, sum[r][v], left);
      }
    }
  }
}

// out [R, width], rows `stride` apart, += a [rows, R]^T times b [rows, 16 V].
template <int R, int V>
void add_outer(const float* a, const float* b, int64_t rows, float* out, int64_t stride, int64_t width) {
  f32x16 sum[R][V] = {};
#pragma GCC unroll 4
  for (int64_t m = 0; m < rows; ++m) add_products<R, V>(a + m * R, 1, b + m * 16 * V, sum);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      float* to = out + r * stride + 16 * v;
      int64_t left = width - 16 * v;
      if (left >= 16) {
        store(to, load(to) + sum[r][v]);
      } else if (left > 0) {
        store_part(to, load_part(to, left) + sum[r][v], left);
      }
    }
  }
}

// The kernel for 1 .. kRows rows and 1 .. kVectors vectors of columns.
template <class Real>
using TileKernel = void (*)(const float*, const float*, int64_t, int64_t, const float*, Real* const*, int64_t, int64_t);
template <class Real, int V, size_t... I>
TileKernel<Real> pick_tile(int64_t rows, std::index_sequence<I...>) {
  static constexpr TileKernel<Real> table[] = {multiply_tile<static_cast<int>(I) + 1, V, Real>...};
  return table[rows - 1];
}
template <class Real>
TileKernel<Real> tile_kernel(int64_t rows, int64_t width) {
  auto all = std::make_index_sequence<kRows>();
  return width <= 16 ? pick_tile<Real, 1>(rows, all) : pick_tile<Real, kVectors>(rows, all);
}
using OuterKernel = void (*)(const float*, const float*, int64_t, float*, int64_t, int64_t);
template <int V, size_t... I>
OuterKernel pick_outer(int64_t rows, std::index_sequence<I...>) {
  static constexpr OuterKernel table[] = {add_outer<static_cast<int>(I) + 1, V>...};
  return table[rows - 1];
}
OuterKernel outer_kernel(int64_t rows, int64_t width) {
  auto all = std::make_index_sequence<kRows>();
  return width <= 16 ? pick_outer<1>(rows, all) : pick_outer<kVectors>(rows, all);
}

// A matrix [depth, columns] cut into strips of kWidth columns, each contiguous and padded with zeros; the last one may
// be 16 wide. Rows of a strip that lie whole rows of the matrix apart would compete for a few sets of the cache.
class Strips {
 public:
  Strips(int64_t depth, int64_t columns)
      : depth_(depth), columns_(columns), packed_(scratch<float, kStripsSlot>(count() * depth * kWidth)) {}
  int64_t count() const { return divide_up(columns_, kWidth); }
  int64_t column(int64_t strip) const { return strip * kWidth; }
  int64_t width(int64_t strip) const { return smaller(columns_ - column(strip), kWidth); }
  int64_t stride(int64_t strip) const { return width(strip) <= 16 ? 16 : kWidth; }
  const float* data(int64_t strip) const { return packed_ + strip * depth_ * kWidth; }

  template <class Real>
  void take(const Real* matrix) {
    parallel_for(count(), [&](int64_t strip, int) {
      int64_t width = this->width(strip), stride = this->stride(strip);
      const Real* from = matrix + column(strip);
      float* to = packed_ + strip * depth_ * kWidth;
      for (int64_t k = 0; k < depth_; ++k, from += columns_, to += stride) {
        for (int64_t c = 0; c < stride; c += 16) {
          store(to + c, width - c >= 16 ? load(from + c) : load_part(from + c, width - c));
        }
      }
    });
  }

  // The same of the transpose of `matrix` [columns, depth].
  template <class Real>
  void take_transposed(const Real* matrix) {
    parallel_for(count(), [&](int64_t strip, int) {
      float* to = packed_ + strip * depth_ * kWidth;
      int64_t width = this->width(strip), stride = this->stride(strip);
      if (width < stride) std::memset(to, 0, sizeof(float) * static_cast<size_t>(depth_ * stride));
      for (int64_t block = 0; block < depth_; block += 64) {
        int64_t end = smaller(block + 64, depth_);
        for (int64_t c = 0; c < width; ++c) {
          const Real* from = matrix + (column(strip) + c) * depth_;
          for (int64_t k = block; k < end; ++k) to[k * stride + c] = to_float(from[k]);
        }
      }
    });
  }

 private:
  int64_t depth_, columns_;
  float* packed_;
};

// The tiles of all spans in one row, so that a task can hold tiles of several.
class Tiles {
 public:
  Tiles(const std::vector<Span>& spans) : spans_(spans) {
    for (const Span& span : spans) count_ += divide_up(span.tokens, kRows);
  }
  int64_t count() const { return count_; }

  // Calls body(span, first, rows, number within the task) for each tile of task `task` out of `tasks`.
  template <class Body>
  void of_task(int64_t task, int64_t tasks, Body&& body) const {
    int64_t begin = task * count_ / tasks, end = (task + 1) * count_ / tasks, passed = 0;
    for (const Span& span : spans_) {
      int64_t tiles = divide_up(span.tokens, kRows);
      for (int64_t t = larger(begin, passed); t < smaller(end, passed + tiles); ++t) {
        int64_t first = (t - passed) * kRows;
        body(span, first, smaller(span.tokens - first, kRows), t - begin);
      }
      passed += tiles;
    }
  }

  // Tasks whose panels of `depth` floats a row stay in the cache, the same number for each thread.
  int64_t tasks(int64_t depth) const {
    int64_t most = kPanelSize / (kRows * larger(depth, 1));
    most = larger(1, smaller(most, kMostTiles));
    return smaller(round_up(divide_up(count_, most), num_threads()), count_);
  }

 private:
  const std::vector<Span>& spans_;
  int64_t count_ = 0;
};

template <class Real>
struct Tile {
  int64_t rows, depth, first;  // rows of the tile, their length, and the row of the matrix they begin to meet
  const float* data;
  Real* out[kRows];
};

template <class Video, class Real>
void forward(const Sizes& s, const Video* video, const Real* weight, const Real* bias, const float* mean,
             const float* deviation, Real* tokens) {
  if (s.tokens() == 0 || s.D == 0) return;
  if constexpr (std::is_same_v<Video, uint8_t>) {
    if (embed_on_matrix_unit(s, video, weight, bias, mean, deviation, tokens)) return;
  }
  std::vector<Span> spans = make_spans(s);
  Patches<Video> patches(s, video, mean, deviation);
  Strips strips(s.K, s.D);
  strips.take(weight);
  float* start = scratch<float, kSumsSlot>(round_up(s.D, kWidth));
  for (int64_t d = 0; d < round_up(s.D, kWidth); ++d) start[d] = d < s.D ? to_float(bias[d]) : 0.0f;

  Tiles tiles(spans);
  int64_t length = round_up(s.K, 16), tasks = tiles.tasks(length);
  parallel_for(tasks, [&](int64_t task, int) {
    std::vector<Tile<Real>> mine(static_cast<size_t>(tiles.count() / tasks + 1));
    float* panel = scratch<float, kPanelSlot>(static_cast<int64_t>(mine.size()) * kRows * length);
    int64_t stride = length + kRunSlack, count = 0;
    float* values = scratch<float, kRowSlot>(kRows * stride);
    tiles.of_task(task, tasks, [&](const Span& span, int64_t first, int64_t rows, int64_t number) {
      float* data = panel + number * kRows * length;
      Tile<Real>& tile = mine[static_cast<size_t>(number)];
      tile.rows = rows, tile.depth = span.depth(s), tile.first = span.first_run * s.run, tile.data = data;
      Cursor cursor(s, span, first);
      for (int64_t r = 0; r < rows; ++r, cursor.next()) {
        patches.read(cursor.value(), span.first_run, span.last_run, values + r * stride);
        tile.out[r] = tokens + cursor.token() * s.D;
      }
      into_tile(values, stride, tile.depth, rows, data);
      ++count;
    });
    for (int64_t strip = 0; strip < strips.count(); ++strip) {
      const float* b = strips.data(strip);
      int64_t column = strips.column(strip), width = strips.width(strip), stride = strips.stride(strip);
      for (int64_t i = 0; i < count; ++i) {
        const Tile<Real>& tile = mine[static_cast<size_t>(i)];
        tile_kernel<Real>(tile.rows, width)(tile.data, b + tile.first * stride, stride, tile.depth, start + column,
                                            tile.out, column, width);
      }
    }
  });
}

// Some consecutive tokens of a span: which they are and where their patches begin.
struct TokenRows {
  std::vector<int64_t> token, value;
  TokenRows(const Sizes& s, const Span& span, int64_t first, int64_t count)
      : token(static_cast<size_t>(count)), value(static_cast<size_t>(count)) {
    Cursor cursor(s, span, first);
    for (size_t i = 0; i < token.size(); ++i, cursor.next()) token[i] = cursor.token(), value[i] = cursor.value();
  }
};

// Copies the rows' gradients into strips [rows][kWidth] and adds their sums to bias_sum.
template <class Real>
void pack_grad(const Sizes& s, const TokenRows& rows, const Real* tokens_grad, float* packed, float* bias_sum) {
  int64_t count = static_cast<int64_t>(rows.token.size());
  parallel_for(divide_up(s.D, kWidth), [&](int64_t strip, int) {
    int64_t column = strip * kWidth, width = smaller(s.D - column, kWidth), stride = width <= 16 ? 16 : kWidth;
    float* to = packed + strip * count * kWidth;
    f32x16 sum[kVectors] = {};
    for (int64_t m = 0; m < count; ++m, to += stride) {
      const Real* from = tokens_grad + rows.token[static_cast<size_t>(m)] * s.D + column;
      for (int64_t c = 0; c < stride; c += 16) {
        f32x16 value = width - c >= 16 ? load(from + c) : load_part(from + c, width - c);
        store(to + c, value);
        sum[c / 16] += value;
      }
    }
    for (int64_t c = 0; c < width; ++c) bias_sum[column + c] += sum[c / 16][c % 16];
  });
}

// weight_sum += patches^T times packed gradient, for the rows of the weight that runs begin .. end-1 meet.
template <class Video>
void add_weight_grad(const Sizes& s, const Patches<Video>& patches, const TokenRows& rows, int64_t begin, int64_t end,
                     const float* packed, float* weight_sum) {
  int64_t depth = (end - begin) * s.run, count = static_cast<int64_t>(rows.value.size());
  if (depth == 0) return;
  int64_t group = divide_up(depth, divide_up(depth, kRows)), stride = round_up(depth, 16) + kRunSlack;
  float* values = scratch<float, kRowSlot>(kRowBlock * stride);
  float* panel = scratch<float, kPanelSlot>(depth * count + kRunSlack);  // [groups][rows][group], the last one narrower
  for (int64_t first = 0; first < count; first += kRowBlock) {
    int64_t block = smaller(kRowBlock, count - first);
    for (int64_t m = 0; m < block; ++m) {
      patches.read(rows.value[static_cast<size_t>(first + m)], begin, end, values + m * stride);
    }
    for (int64_t k = 0; k < depth; k += group) {
      int64_t taken = smaller(group, depth - k);
      float* to = panel + k * count + first * taken;
      const float* behind = panel + (k + taken) * count;
      for (int64_t m = 0; m < block; ++m, to += taken) {
        // A whole vector's excess falls on rows that are written later, except at the end of a group.
        if (to + 16 <= behind) {
          store(to, load(values + m * stride + k));
        } else {
          std::memcpy(to, values + m * stride + k, sizeof(float) * static_cast<size_t>(taken));
        }
      }
    }
  }
  float* out = weight_sum + begin * s.run * s.D;
  for (int64_t column = 0; column < s.D; column += kWidth) {
    int64_t width = smaller(s.D - column, kWidth);
    for (int64_t k = 0; k < depth; k += group) {
      outer_kernel(smaller(group, depth - k), width)(panel + k * count, packed + column * count, count,
                                                     out + k * s.D + column, s.D, width);
    }
  }
}

template <class Video, class Real>
void weight_gradient(const Sizes& s, const Video* video, const Real* tokens_grad, const float* mean,
                     const float* deviation, float* weight_sum, float* bias_sum) {
  std::memset(weight_sum, 0, sizeof(float) * static_cast<size_t>(s.K * s.D));
  std::memset(bias_sum, 0, sizeof(float) * static_cast<size_t>(s.D));
  if (s.tokens() == 0 || s.D == 0) return;
  Patches<Video> patches(s, video, mean, deviation);
  int64_t most = larger(512, smaller(kGradBlock / s.D, 4096));
  float* packed = scratch<float, kGradSlot>(smaller(most, s.tokens()) * round_up(s.D, kWidth));
  for (const Span& span : make_spans(s)) {
    int64_t runs = span.last_run - span.first_run, threads = num_threads();
    int64_t chunks = smaller(round_up(divide_up(span.depth(s), kGradDepth), threads), runs);
    for (int64_t first = 0; first < span.tokens; first += most) {
      TokenRows rows(s, span, first, smaller(most, span.tokens - first));
      pack_grad(s, rows, tokens_grad, packed, bias_sum);
      parallel_for(chunks, [&](int64_t chunk, int) {
        int64_t begin = span.first_run + chunk * runs / chunks, end = span.first_run + (chunk + 1) * runs / chunks;
        add_weight_grad(s, patches, rows, begin, end, packed, weight_sum);
      });
    }
  }
}

template <class Real>
void video_gradient(const Sizes& s, const Real* weight, const Real* tokens_grad, const float* deviation,
                    float* video_grad) {
  if (s.values() == 0) return;
  std::vector<Span> spans = make_spans(s);
  Strips strips(s.D, s.K);
  strips.take_transposed(weight);
  std::vector<float> scale(static_cast<size_t>(s.run)), none(static_cast<size_t>(kWidth), 0.0f);
  for (int64_t i = 0; i < s.run; ++i) scale[static_cast<size_t>(i)] = 1.0f / deviation[i % s.C];

  Tiles tiles(spans);
  int64_t length = round_up(s.D, 16), width = round_up(s.K, kWidth), tasks = tiles.tasks(length);
  parallel_for(tasks, [&](int64_t task, int) {
    float* panel = scratch<float, kPanelSlot>((tiles.count() / tasks + 1) * kRows * length);
    float* result = scratch<float, kResultSlot>((tiles.count() / tasks + 1) * kRows * width);
    float* values = scratch<float, kRowSlot>(kRows * length);
    std::vector<Tile<float>> mine(static_cast<size_t>(tiles.count() / tasks + 1));
    int64_t count = 0;
    tiles.of_task(task, tasks, [&](const Span& span, int64_t first, int64_t rows, int64_t number) {
      float* data = panel + number * kRows * length;
      Tile<float>& tile = mine[static_cast<size_t>(number)];
      tile.rows = rows, tile.depth = s.D, tile.first = 0, tile.data = data;
      Cursor cursor(s, span, first);
      for (int64_t r = 0; r < rows; ++r, cursor.next()) {
        const Real* from = tokens_grad + cursor.token() * s.D;
        for (int64_t d = 0; d < s.D; d += 16) {
          store(values + r * length + d, s.D - d >= 16 ? load(from + d) : load_part(from + d, s.D - d));
        }
        tile.out[r] = result + (number * kRows + r) * width;
      }
      into_tile(values, length, s.D, rows, data);
      ++count;
    });
    for (int64_t strip = 0; strip < strips.count(); ++strip) {
      for (int64_t i = 0; i < count; ++i) {
        const Tile<float>& tile = mine[static_cast<size_t>(i)];
        tile_kernel<float>(tile.rows, strips.width(strip))(tile.data, strips.data(strip), strips.stride(strip), s.D,
                                                           none.data(), tile.out, strips.column(strip),
                                                           strips.width(strip));
      }
    }
    tiles.of_task(task, tasks, [&](const Span& span, int64_t first, int64_t rows, int64_t number) {
      Cursor cursor(s, span, first);
      for (int64_t r = 0; r < rows; ++r, cursor.next()) {
        const float* from = mine[static_cast<size_t>(number)].out[r];
        for (int64_t run = span.first_run; run < span.last_run; ++run) {
          float* to = video_grad + cursor.value() + (run / s.ph * s.H + run % s.ph) * s.line;
          for (int64_t i = 0; i < s.run; ++i) to[i] = from[run * s.run + i] * scale[static_cast<size_t>(i)];
        }
      }
    });
  });
}

inline void narrow_all(const float* from, int64_t count, bf16* to) {
  for (int64_t i = 0; i < count; i += 16) {
    int64_t part = smaller(16, count - i);
    store_part(to + i, load_part(from + i, part), part);
  }
}

template <class Video>
void parameter_gradients(const Sizes& s, const Video* video, const float* tokens_grad, const float* mean,
                         const float* deviation, float* weight_grad, float* bias_grad) {
  weight_gradient(s, video, tokens_grad, mean, deviation, weight_grad, bias_grad);
}
template <class Video>
void parameter_gradients(const Sizes& s, const Video* video, const bf16* tokens_grad, const float* mean,
                         const float* deviation, bf16* weight_grad, bf16* bias_grad) {
  float* sums = scratch<float, kSumsSlot>((s.K + 1) * s.D);
  weight_gradient(s, video, tokens_grad, mean, deviation, sums, sums + s.K * s.D);
  narrow_all(sums, s.K * s.D, weight_grad);
  narrow_all(sums + s.K * s.D, s.D, bias_grad);
}

}  // namespace
}  // namespace ernie5

using ernie5::bf16;
using ernie5::patch_embed::Sizes;

// The library's type for the bits of a bfloat16 that the C interface takes.
static const bf16* halves(const uint16_t* bits) { return reinterpret_cast<const bf16*>(bits); }
static bf16* halves(uint16_t* bits) { return reinterpret_cast<bf16*>(bits); }
static const float* halves(const float* values) { return values; }
static float* halves(float* values) { return values; }

#define FORWARD(NAME, VIDEO, REAL)                                                                                  \
  void ernie5_patch_embed_forward_cpu_##NAME(const VIDEO* video, const REAL* weight, const REAL* bias,              \
                                             const float* mean, const float* deviation, REAL* tokens,               \
                                             ERNIE5_PATCH_EMBED_SIZES) {                                            \
    Sizes s{B, T, H, W, C, pt, ph, pw, lead, D};                                                                    \
    ernie5::forward(s, video, halves(weight), halves(bias), mean, deviation, halves(tokens));                       \
  }
#define BACKWARD_OF_BYTES(NAME, REAL)                                                                               \
  void ernie5_patch_embed_backward_cpu_##NAME(const uint8_t* video, const REAL* tokens_grad, const float* mean,     \
                                              const float* deviation, REAL* weight_grad, REAL* bias_grad,           \
                                              ERNIE5_PATCH_EMBED_SIZES) {                                           \
    Sizes s{B, T, H, W, C, pt, ph, pw, lead, D};                                                                    \
    ernie5::parameter_gradients(s, video, halves(tokens_grad), mean, deviation, halves(weight_grad),                \
                                halves(bias_grad));                                                                 \
  }
#define BACKWARD_OF_FLOATS(NAME, REAL)                                                                              \
  void ernie5_patch_embed_backward_cpu_##NAME(                                                                      \
      const float* video, const REAL* weight, const REAL* tokens_grad, const float* mean, const float* deviation,   \
      REAL* weight_grad, REAL* bias_grad, float* video_grad, ERNIE5_PATCH_EMBED_SIZES) {                            \
    Sizes s{B, T, H, W, C, pt, ph, pw, lead, D};                                                                    \
    ernie5::parameter_gradients(s, video, halves(tokens_grad), mean, deviation, halves(weight_grad),                \
                                halves(bias_grad));                                                                 \
    if (video_grad != nullptr) {                                                                                    \
      ernie5::video_gradient(s, halves(weight), halves(tokens_grad), deviation, video_grad);                        \
    }                                                                                                               \
  }

FORWARD(u8_f32, uint8_t, float)
FORWARD(f32_f32, float, float)
FORWARD(u8_bf16, uint8_t, uint16_t)
FORWARD(f32_bf16, float, uint16_t)
BACKWARD_OF_BYTES(u8_f32, float)
BACKWARD_OF_BYTES(u8_bf16, uint16_t)
BACKWARD_OF_FLOATS(f32_f32, float)
BACKWARD_OF_FLOATS(f32_bf16, uint16_t)
