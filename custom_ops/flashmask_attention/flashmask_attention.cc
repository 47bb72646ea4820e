#include "flashmask_attention/flashmask_attention.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>

#include "common/parallel.h"
#include "common/simd.h"
#include "flashmask_attention/mask.h"
#include "flashmask_attention/tile.h"

namespace ernie5 {
namespace flashmask {
namespace {

constexpr float kHidden = -1.0e30f;  // a score that no exponential survives
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr int64_t kTasks = 4;         // the backward pass splits the keys until it has as many tasks
constexpr int64_t kMostChunks = 4;     // a piece of the keys costs one more copy of the gradient of q
constexpr int64_t kLeastChunk = 512;   // keys
constexpr int64_t kPieces = 4;         // tasks a thread in the forward pass, at least
constexpr int64_t kFewRows = 4;        // so few rows are done one by one
constexpr int64_t kNear = 1 << 19;     // floats a task copies into its thread's scratch, to stay in cache

struct Shape {
  int64_t batch, rows, columns, heads, groups, head_dim, mask_heads, bounds;
  bool causal;
  int64_t query_start;
  float scale;

  int64_t repeats() const { return heads / groups; }
  int64_t width() const { return round_up(head_dim, kLanes); }
  int64_t blocks() const { return ceil_div(columns, kKeys); }
  int64_t tiles() const { return ceil_div(rows, kRows); }
  int64_t padded_rows() const { return tiles() * kRows; }
  int64_t padded_columns() const { return blocks() * kKeys; }
  // Floats of the dense keys and values of one group; of the rows, gradients and row sums of its query heads.
  int64_t forward_copies() const { return 2 * padded_columns() * width(); }
  int64_t backward_copies() const { return repeats() * padded_rows() * (3 * width() + 2); }
  int64_t chunks() const {
    int64_t wanted = ceil_div(kTasks, std::max<int64_t>(1, batch * groups));
    int64_t possible = std::max<int64_t>(1, columns / kLeastChunk);
    return std::min(std::min(wanted, possible), kMostChunks);
  }
};

// A tensor [batch, length, heads, head_dim].
template <class T>
struct Tensor {
  T* data;
  int64_t length, heads, head_dim;
  int64_t stride() const { return heads * head_dim; }
  T* at(int64_t batch, int64_t head, int64_t row) const {
    return data + ((batch * length + row) * heads + head) * head_dim;
  }
};

// Where the pieces of the workspace lie, in floats.
struct Layout {
  int64_t planes, ends, seen, copies, size = 0;

  Layout(const Shape& s, bool backward) {
    int64_t masks = s.batch * s.mask_heads;
    planes = take(masks * 4 * s.padded_columns());
    ends = take(masks * s.blocks() * static_cast<int64_t>(sizeof(BlockEnds) / sizeof(float)));
    int64_t tasks = s.batch * s.groups * (backward ? s.chunks() : 1);
    seen = take(backward ? tasks * s.tiles() : 0);
    int64_t each = backward ? s.backward_copies() : s.forward_copies();
    bool near = each <= kNear && (!backward || s.chunks() == 1);
    copies = near ? kNowhere : take(tasks * each);
  }
  static constexpr int64_t kNowhere = -1;
  int64_t take(int64_t count) {
    int64_t begin = size;
    size += round_up(count, kLanes);
    return begin;
  }
};

// Scratch of this thread, kept between calls.
float* scratch(int64_t floats) {
  struct Kept {
    float* data = nullptr;
    int64_t size = 0;
    ~Kept() { std::free(data); }
  };
  thread_local Kept kept;
  if (kept.size < floats) {
    std::free(kept.data);
    kept.data = static_cast<float*>(std::aligned_alloc(64, static_cast<size_t>(round_up(floats, 16)) * sizeof(float)));
    kept.size = floats;
  }
  return kept.data;
}

// `count` rows as floats [rows, width], zero beyond head_dim and in the rows from count to `rows`. Rows of one head
// among many lie so far apart that they push each other out of the caches: kernels work on such copies.
template <class T>
void fetch(const T* from, int64_t stride, int64_t count, int64_t rows, int64_t head_dim, int64_t width, float* to) {
  constexpr int64_t ahead = 8, line = 64 / static_cast<int64_t>(sizeof(T));
  int64_t whole = head_dim / kLanes * kLanes;
  for (int64_t row = 0; row < count; ++row, from += stride, to += width) {
    const T* later = from + std::min(ahead, count - 1 - row) * stride;
    for (int64_t c = 0; c < head_dim; c += line) __builtin_prefetch(later + c);
    for (int64_t c = 0; c < whole; c += kLanes) store(to + c, load(from + c));
    if (whole < head_dim) store(to + whole, load_part(from + whole, head_dim - whole));
  }
  if (count < rows) std::memset(to, 0, sizeof(float) * static_cast<size_t>((rows - count) * width));
}

template <class T>
void put(f32x16 v, int64_t column, int64_t head_dim, T* to) {
  if (column + kLanes <= head_dim) {
    store(to + column, v);
  } else {
    store_part(to + column, v, head_dim - column);
  }
}

template <class T>
float dot(const float* a, const T* b, int64_t count) {
  f32x16 total{};
  int64_t c = 0;
  for (; c + kLanes <= count; c += kLanes) total += load(a + c) * load(b + c);
  if (c < count) total += load(a + c) * load_part(b + c, count - c);
  return sum(total);
}

// to += factor * from
template <class T>
void add_scaled(const T* from, float factor, int64_t count, float* to) {
  int64_t c = 0;
  for (; c + kLanes <= count; c += kLanes) store(to + c, load(to + c) + load(from + c) * factor);
  if (c < count) store(to + c, load(to + c) + load_part(from + c, count - c) * factor);
}

// The mask of every (batch item, mask head), in the workspace.
class Masks {
 public:
  Masks(const int32_t* intervals, const Shape& s, const Layout& layout, float* workspace)
      : s_(s),
        planes_(reinterpret_cast<int32_t*>(workspace + layout.planes)),
        ends_(reinterpret_cast<BlockEnds*>(workspace + layout.ends)) {
    parallel_for(s.batch * s.mask_heads, [&](int64_t index, int) {
      mask(index).build(intervals + index * s.columns * s.bounds, s.bounds, s.causal, s.query_start);
    });
  }
  Mask of(int64_t batch, int64_t group) const {
    return mask(batch * s_.mask_heads + (s_.mask_heads == 1 ? 0 : group));
  }

 private:
  Mask mask(int64_t index) const {
    int64_t blocks = s_.blocks();
    return Mask(planes_ + index * 4 * blocks * kKeys, ends_ + index * blocks, s_.columns, s_.rows);
  }
  const Shape& s_;
  int32_t* planes_;
  BlockEnds* ends_;
};

i32x16 lanes_from(int64_t first) {
  i32x16 lanes;
  for (int i = 0; i < kLanes; ++i) lanes[i] = i;
  return lanes + static_cast<int32_t>(first);
}

// ---------------------------------------------------------------- forward

// One tile of 64 rows of one query head against every key block it sees. Scores lie with the rows in the lanes
// [keys, rows], so that the softmax never reduces across a vector.
class ForwardTile {
 public:
  ForwardTile(const Shape& s, float* space) : s_(s), width_(s.width()) {
    q_ = space;
    p_ = q_ + width_ * kRows;
    o_ = p_ + kKeys * kRows;
  }
  static int64_t space(const Shape& s) { return 2 * s.width() * kRows + kKeys * kRows; }

  // k, v: the dense rows [padded columns, width] of the head's group.
  template <class T>
  void run(const Tensor<const T>& q, const float* k, const float* v, const Mask& mask, int64_t batch, int64_t head,
           int64_t tile, const Tensor<T>& out, float* lse) {
    begin_ = static_cast<int32_t>(tile * kRows);
    end_ = static_cast<int32_t>(std::min(s_.rows, begin_ + int64_t{kRows}));
    // The output's space serves as the place where q is widened and padded.
    fetch(q.at(batch, head, begin_), q.stride(), end_ - begin_, kRows, s_.head_dim, width_, o_);
    transpose_tile(o_, width_, width_, s_.scale * kLog2E, q_);
    std::memset(o_, 0, sizeof(float) * static_cast<size_t>(kRows * width_));
    for (int i = 0; i < kRowVectors; ++i) top_[i] = splat(kHidden), total_[i] = f32x16{};
    Alive alive;
    for (int64_t block = 0; block < s_.blocks(); ++block) {
      Sight sight = mask.look(block, begin_, end_, &alive);
      if (sight == Sight::kNone) continue;
      const float *keys = k + block * kKeys * width_, *values = v + block * kKeys * width_;
      if (sight == Sight::kAll) {
        scores<false>(keys, mask, block, alive);
        softmax<false>(alive);
        add_values<false>(values, alive);
      } else {
        scores<true>(keys, mask, block, alive);
        softmax<true>(alive);
        add_values<true>(values, alive);
      }
    }
    write(batch, head, out, lse);
  }

 private:
  static constexpr int kRowVectors = kRows / kLanes;
  static constexpr int kKeyGroups = kKeys / kGroup;

  static uint32_t seen(const Alive& alive, int row_vector) {
    return alive.groups[2 * row_vector] | alive.groups[2 * row_vector + 1];
  }

  // p[key, row] = q k in units of log 2, hidden ones kHidden; best_ = the greatest of each row.
  template <bool masked>
  void scores(const float* k, const Mask& mask, int64_t block, const Alive& alive) {
    for (int i = 0; i < kRowVectors; ++i) best_[i] = top_[i];
    for (int group = 0; group < kKeyGroups; ++group) {
      for (int vector = 0; vector < kRowVectors; vector += 2) {
        bool one = true, two = true;
        if (masked) {
          one = (seen(alive, vector) >> (group / 2) & 1) != 0;
          two = (seen(alive, vector + 1) >> (group / 2) & 1) != 0;
        }
        if (one && two) {
          score_group<masked, 2>(k, mask, block, group, vector);
        } else if (one) {
          score_group<masked, 1>(k, mask, block, group, vector);
        } else if (two) {
          score_group<masked, 1>(k, mask, block, group, vector + 1);
        }
      }
    }
  }
  template <bool masked, int V>
  void score_group(const float* k, const Mask& mask, int64_t block, int group, int vector) {
    f32x16 acc[kGroup][V] = {};
    multiply(acc, k + group * kGroup * width_, width_, 1, q_ + vector * kLanes, kRows, s_.head_dim);
    float* to = p_ + group * kGroup * kRows + vector * kLanes;
    f32x16 best[V];
    for (int v = 0; v < V; ++v) best[v] = best_[vector + v];
#pragma GCC unroll 8
    for (int i = 0; i < kGroup; ++i) {
      if (masked) {
        Ends ends = mask.of_column(block * kKeys + group * kGroup + i);
        for (int v = 0; v < V; ++v) {
          acc[i][v] = where_seen(lanes_from(begin_ + (vector + v) * kLanes), ends, acc[i][v], splat(kHidden));
        }
      }
      for (int v = 0; v < V; ++v) {
        best[v] = maximum(best[v], acc[i][v]);
        store(to + i * kRows + v * kLanes, acc[i][v]);
      }
    }
    for (int v = 0; v < V; ++v) best_[vector + v] = best[v];
  }

  // p = 2^(p - best), the factors by which earlier sums shrink, and the new sums.
  template <bool masked>
  void softmax(const Alive& alive) {
    for (int row = 0; row < kRowVectors; ++row) {
      // A row that has seen nothing yet keeps kHidden as its greatest score; its terms must vanish all the same.
      f32x16 base = best_[row] > splat(0.5f * kHidden) ? best_[row] : f32x16{};
      f32x16 shrink = exp2(top_[row] - base);
      top_[row] = best_[row];
      store(shrink_ + row * kLanes, shrink);
      f32x16 sums[2] = {total_[row] * shrink, f32x16{}};
      for (int vector = 0; vector < kKeyVectors; ++vector) {
        float* p = p_ + vector * kLanes * kRows + row * kLanes;
        if (masked && (seen(alive, row) >> vector & 1) == 0) {
          for (int i = 0; i < kLanes; ++i) store(p + i * kRows, f32x16{});
          continue;
        }
#pragma GCC unroll 4
        for (int i = 0; i < kLanes; ++i) {
          f32x16 term = exp2(load(p + i * kRows) - base);
          store(p + i * kRows, term);
          sums[i % 2] += term;
        }
      }
      total_[row] = sums[0] + sums[1];
    }
  }

  // o[row, :] = o * shrink + p^T v
  template <bool masked>
  void add_values(const float* v, const Alive& alive) {
    for (int64_t c = 0; c < width_; c += 2 * kLanes) {
      for (int group = 0; group < kRowGroups; ++group) {
        Span span = masked ? span_of(alive.groups[group]) : Span{0, kKeyVectors};
        if (span.first == span.last) continue;
        if (c + kLanes < width_) {
          add_group<2>(v, group, span, c);
        } else {
          add_group<1>(v, group, span, c);
        }
      }
    }
  }
  template <int V>
  void add_group(const float* values, int group, Span span, int64_t column) {
    f32x16 acc[kGroup][V];
    float* to = o_ + group * kGroup * width_ + column;
#pragma GCC unroll 8
    for (int i = 0; i < kGroup; ++i) {
      for (int v = 0; v < V; ++v) acc[i][v] = load(to + i * width_ + v * kLanes) * shrink_[group * kGroup + i];
    }
    int64_t first = span.first * kLanes, depth = (span.last - span.first) * kLanes;
    multiply(acc, p_ + first * kRows + group * kGroup, 1, kRows, values + first * width_ + column, width_, depth);
#pragma GCC unroll 8
    for (int i = 0; i < kGroup; ++i) {
      for (int v = 0; v < V; ++v) store(to + i * width_ + v * kLanes, acc[i][v]);
    }
  }

  template <class T>
  void write(int64_t batch, int64_t head, const Tensor<T>& out, float* lse) {
    for (int32_t row = begin_; row < end_; ++row) {
      int i = row - begin_;
      float total = total_[i / kLanes][i % kLanes], top = top_[i / kLanes][i % kLanes];
      float inverse = total > 0.0f ? 1.0f / total : 0.0f;
      T* to = out.at(batch, head, row);
      for (int64_t c = 0; c < width_; c += kLanes) put(load(o_ + i * width_ + c) * inverse, c, s_.head_dim, to);
      lse[(batch * s_.heads + head) * s_.rows + row] =
          total > 0.0f ? (top + std::log2(total)) * kLn2 : -std::numeric_limits<float>::infinity();
    }
  }

  const Shape& s_;
  int64_t width_;
  int32_t begin_ = 0, end_ = 0;
  float *q_, *p_, *o_;
  f32x16 top_[kRowVectors], best_[kRowVectors], total_[kRowVectors];
  float shrink_[kRows];
};

// One row of one head: so few that nothing is gained by tiles. `weights` has room for every column.
template <class T>
void forward_row(const Tensor<const T>& q, const Tensor<const T>& k, const Tensor<const T>& v, const Mask& mask,
                 const Shape& s, int64_t batch, int64_t head, int64_t row, const Tensor<T>& out, float* lse,
                 float* weights) {
  int64_t group = head / s.repeats(), width = s.width();
  float *query = weights + s.padded_columns(), *result = query + width;
  fetch(q.at(batch, head, row), q.stride(), 1, 1, s.head_dim, width, query);
  for (int64_t c = 0; c < width; c += kLanes) store(result + c, f32x16{});
  int32_t place = static_cast<int32_t>(row);
  float top = kHidden, total = 0.0f;
  Alive alive;
  auto each_block = [&](auto&& body) {
    for (int64_t block = 0; block < s.blocks(); ++block) {
      if (mask.look(block, place, place + 1, &alive) != Sight::kNone) body(block * kKeys);
    }
  };
  each_block([&](int64_t first) {
    for (int64_t j = first; j < std::min(first + kKeys, s.columns); ++j) {
      weights[j] = dot(query, k.at(batch, group, j), s.head_dim) * s.scale * kLog2E;
    }
    for (int64_t j = first; j < first + kKeys; j += kLanes) {
      f32x16 seen = where_seen(splat_int(place), mask.of_vector(j), load(weights + j), splat(kHidden));
      store(weights + j, seen);
      top = std::max(top, largest(seen));
    }
  });
  bool blind = !(top > 0.5f * kHidden);
  lse[(batch * s.heads + head) * s.rows + row] = -std::numeric_limits<float>::infinity();
  if (!blind) {
    each_block([&](int64_t first) {
      f32x16 sums{};
      for (int64_t j = first; j < first + kKeys; j += kLanes) {
        f32x16 terms = exp2(load(weights + j) - top);
        store(weights + j, terms);
        sums += terms;
      }
      total += sum(sums);
      for (int64_t j = first; j < std::min(first + kKeys, s.columns); ++j) {
        add_scaled(v.at(batch, group, j), weights[j], s.head_dim, result);
      }
    });
    lse[(batch * s.heads + head) * s.rows + row] = (top + std::log2(total)) * kLn2;
  }
  float inverse = blind ? 0.0f : 1.0f / total;
  for (int64_t c = 0; c < width; c += kLanes) put(load(result + c) * inverse, c, s.head_dim, out.at(batch, head, row));
}

template <class T>
void forward(const T* q, const T* k, const T* v, const int32_t* intervals, const Shape& s, T* out, float* lse,
             float* workspace) {
  if (s.batch * s.heads * s.rows == 0) return;
  Layout layout(s, false);
  Masks masks(intervals, s, layout, workspace);
  Tensor<const T> queries{q, s.rows, s.heads, s.head_dim};
  Tensor<const T> keys{k, s.columns, s.groups, s.head_dim}, values{v, s.columns, s.groups, s.head_dim};
  Tensor<T> result{out, s.rows, s.heads, s.head_dim};
  if (s.rows <= kFewRows) {
    parallel_for(s.batch * s.heads * s.rows, [&](int64_t task, int) {
      int64_t row = task % s.rows, head = task / s.rows % s.heads, batch = task / s.rows / s.heads;
      forward_row(queries, keys, values, masks.of(batch, head / s.repeats()), s, batch, head, row, result, lse,
                  scratch(s.padded_columns() + 2 * s.width()));
    });
    return;
  }
  // A task takes every pieces-th tile of the query heads of one group, with dense copies of its keys and values.
  int64_t groups = s.batch * s.groups, tiles = s.repeats() * s.tiles(), half = s.forward_copies() / 2;
  int64_t pieces = std::min(ceil_div(kPieces * num_threads(), groups), tiles);
  auto copy = [&](int64_t index, int64_t first, int64_t rows, float* to) {
    int64_t batch = index / s.groups, group = index % s.groups, count = std::min(rows, s.columns - first);
    to += first * s.width();
    fetch(keys.at(batch, group, first), keys.stride(), count, rows, s.head_dim, s.width(), to);
    fetch(values.at(batch, group, first), values.stride(), count, rows, s.head_dim, s.width(), to + half);
  };
  bool near = layout.copies == Layout::kNowhere;
  if (!near) {
    parallel_for(groups * s.blocks(), [&](int64_t task, int) {
      int64_t index = task / s.blocks();
      copy(index, task % s.blocks() * kKeys, kKeys, workspace + layout.copies + index * 2 * half);
    });
  }
  parallel_for(groups * pieces, [&](int64_t task, int) {
    int64_t index = task % groups, batch = index / s.groups, group = index % s.groups;
    float* space = scratch(ForwardTile::space(s) + (near ? 2 * half : 0));
    float* dense = near ? space + ForwardTile::space(s) : workspace + layout.copies + index * 2 * half;
    if (near) copy(index, 0, s.padded_columns(), dense);
    ForwardTile worker(s, space);
    for (int64_t tile = task / groups; tile < tiles; tile += pieces) {
      // Late rows first: under a causal mask they are the long ones.
      int64_t head = group * s.repeats() + tile % s.repeats(), row_tile = s.tiles() - 1 - tile / s.repeats();
      worker.run(queries, dense, dense + half, masks.of(batch, group), batch, head, row_tile, result, lse);
    }
  });
}

// ---------------------------------------------------------------- backward

// One block of keys against every tile of rows of the query heads that share it. Scores lie with the keys in the lanes
// [rows, keys].
class BackwardBlock {
 public:
  BackwardBlock(const Shape& s, float* space) : s_(s), width_(s.width()) {
    int64_t tile = kKeys * width_;
    k_space_ = space;
    k_ = k_space_ + tile;
    v_ = k_ + tile;
    grad_k_ = v_ + tile;
    grad_v_ = grad_k_ + tile;
    p_ = grad_v_ + tile;
    ds_ = p_ + kRows * kKeys;
  }
  static int64_t space(const Shape& s) { return 5 * s.width() * kKeys + 2 * kRows * kKeys; }

  // Loads the keys and values of the block and clears their gradients.
  template <class T>
  void open(const Tensor<const T>& k, const Tensor<const T>& v, int64_t batch, int64_t group, int64_t block) {
    int64_t first = block * kKeys, count = std::min<int64_t>(kKeys, s_.columns - first);
    block_ = block;
    fetch(v.at(batch, group, first), v.stride(), count, kKeys, s_.head_dim, width_, k_space_);
    transpose_tile(k_space_, width_, width_, 1.0f, v_);
    fetch(k.at(batch, group, first), k.stride(), count, kKeys, s_.head_dim, width_, k_space_);
    transpose_tile(k_space_, width_, width_, 1.0f, k_);
    std::memset(grad_k_, 0, sizeof(float) * static_cast<size_t>(2 * kKeys * width_));
  }

  // One tile of rows of one head; q, grad and grad_q are dense [64, width].
  void run(const float* q, const float* grad, const Mask& mask, int64_t tile, const float* lse, const float* delta,
           float* grad_q) {
    begin_ = static_cast<int32_t>(tile * kRows);
    int32_t end = static_cast<int32_t>(std::min(s_.rows, begin_ + int64_t{kRows}));
    Alive alive;
    Sight sight = mask.look(block_, begin_, end, &alive);
    if (sight == Sight::kAll) {
      tile_gradients<false>(q, grad, mask, alive, lse, delta, grad_q);
    } else if (sight == Sight::kSome) {
      tile_gradients<true>(q, grad, mask, alive, lse, delta, grad_q);
    }
  }

  template <class T>
  void close(int64_t batch, int64_t group, const Tensor<T>& grad_k, const Tensor<T>& grad_v) {
    int64_t first = block_ * kKeys, count = std::min<int64_t>(kKeys, s_.columns - first);
    for (int64_t row = 0; row < count; ++row) {
      for (int64_t c = 0; c < width_; c += kLanes) {
        put(load(grad_k_ + row * width_ + c), c, s_.head_dim, grad_k.at(batch, group, first + row));
        put(load(grad_v_ + row * width_ + c), c, s_.head_dim, grad_v.at(batch, group, first + row));
      }
    }
  }

 private:
  static constexpr int kKeyGroups = kKeys / kGroup;

  template <bool masked>
  void tile_gradients(const float* q, const float* grad, const Mask& mask, const Alive& alive, const float* lse,
                      const float* delta, float* grad_q) {
    for (int vector = 0; vector < kKeyVectors; vector += 2) {
      for (int group = 0; group < kRowGroups; ++group) {
        uint32_t live = masked ? alive.groups[group] >> vector & 3 : 3;
        if (live == 3) {
          score_group<masked, 2>(q, grad, mask, group, vector, lse, delta);
          continue;
        }
        for (int v = 0; v < 2; ++v) {
          if ((live >> v & 1) != 0) {
            score_group<masked, 1>(q, grad, mask, group, vector + v, lse, delta);
          } else {
            clear_group(group, vector + v);
          }
        }
      }
    }
    // The right operand of each product stays in the first cache: two vectors of 64 rows.
    Span rows[kKeyVectors];
    for (int v = 0; v < kKeyVectors; ++v) rows[v] = masked ? rows_of(alive, v) : Span{0, kRowGroups};
    for (int64_t c = 0; c < width_; c += 2 * kLanes) {
      for (int group = 0; group < kKeyGroups; ++group) {
        add_rows(p_ + group * kGroup, 1, kKeys, grad, rows[group / 2], kGroup, c, grad_v_ + group * kGroup * width_);
      }
      for (int group = 0; group < kKeyGroups; ++group) {
        add_rows(ds_ + group * kGroup, 1, kKeys, q, rows[group / 2], kGroup, c, grad_k_ + group * kGroup * width_);
      }
      for (int group = 0; group < kRowGroups; ++group) {
        Span span = masked ? span_of(alive.groups[group]) : Span{0, kKeyVectors};
        add_rows(ds_ + group * kGroup * kKeys, kKeys, 1, k_space_, span, kLanes, c, grad_q + group * kGroup * width_);
      }
    }
  }

  // The row groups that see any of sixteen columns.
  static Span rows_of(const Alive& alive, int vector) {
    uint32_t bits = 0;
    for (int group = 0; group < kRowGroups; ++group) bits |= (alive.groups[group] >> vector & 1) << group;
    return span_of(bits);
  }

  void clear_group(int group, int vector) {
    int64_t at = group * kGroup * kKeys + vector * kLanes;
    for (int i = 0; i < kGroup; ++i) {
      store(p_ + at + i * kKeys, f32x16{});
      store(ds_ + at + i * kKeys, f32x16{});
    }
  }

  // p = softmax, ds = scale * p * (grad v^T - delta) for eight rows and 16 V keys.
  template <bool masked, int V>
  void score_group(const float* q, const float* grad, const Mask& mask, int group, int vector, const float* lse,
                   const float* delta) {
    int64_t row = group * kGroup, at = row * kKeys + vector * kLanes;
    {
      f32x16 acc[kGroup][V] = {};
      multiply(acc, q + row * width_, width_, 1, k_ + vector * kLanes, kKeys, s_.head_dim);
      float factor = s_.scale * kLog2E;
#pragma GCC unroll 8
      for (int i = 0; i < kGroup; ++i) {
        for (int v = 0; v < V; ++v) {
          f32x16 p = exp2(acc[i][v] * factor - lse[row + i]);
          if (masked) {
            Ends ends = mask.of_vector(block_ * kKeys + (vector + v) * kLanes);
            p = where_seen(splat_int(begin_ + static_cast<int32_t>(row) + i), ends, p, f32x16{});
          }
          store(p_ + at + i * kKeys + v * kLanes, p);
        }
      }
    }
    f32x16 acc[kGroup][V] = {};
    multiply(acc, grad + row * width_, width_, 1, v_ + vector * kLanes, kKeys, s_.head_dim);
#pragma GCC unroll 8
    for (int i = 0; i < kGroup; ++i) {
      for (int v = 0; v < V; ++v) {
        f32x16 p = load(p_ + at + i * kKeys + v * kLanes);
        store(ds_ + at + i * kKeys + v * kLanes, p * (acc[i][v] * s_.scale - delta[row + i]));
      }
    }
  }

  // to[i, c ..] += sum over k in `unit` * span of a[i * a_row + k * a_step] * b[k, c ..] for eight i and 32 columns.
  void add_rows(const float* a, int64_t a_row, int64_t a_step, const float* b, Span span, int64_t unit, int64_t c,
                float* to) {
    int64_t first = span.first * unit, depth = (span.last - span.first) * unit;
    if (depth == 0) return;
    if (c + kLanes < width_) {
      add_columns<2>(a + first * a_step, a_row, a_step, b + first * width_ + c, depth, to + c);
    } else {
      add_columns<1>(a + first * a_step, a_row, a_step, b + first * width_ + c, depth, to + c);
    }
  }
  template <int V>
  void add_columns(const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t depth, float* to) {
    f32x16 acc[kGroup][V] = {};
    multiply(acc, a, a_row, a_step, b, width_, depth);
#pragma GCC unroll 8
    for (int i = 0; i < kGroup; ++i) {
      for (int v = 0; v < V; ++v) {
        float* at = to + i * width_ + v * kLanes;
        store(at, load(at) + acc[i][v]);
      }
    }
  }

  const Shape& s_;
  int64_t width_, block_ = 0;
  int32_t begin_ = 0;
  float *k_space_, *k_, *v_, *grad_k_, *grad_v_, *p_, *ds_;
};

// Whether a tile of rows sees anything of blocks [first, last).
bool sees_any(const Mask& mask, int64_t first, int64_t last, int64_t tile, const Shape& s) {
  auto begin = static_cast<int32_t>(tile * kRows), end = static_cast<int32_t>(std::min(s.rows, tile * kRows + kRows));
  Alive alive;
  for (int64_t block = first; block < last; ++block) {
    if (mask.look(block, begin, end, &alive) != Sight::kNone) return true;
  }
  return false;
}

// What a backward task keeps of the query heads of one group, head after head: dense rows of q and of the gradient of
// out, the gradient of q so far, and two numbers a row.
struct Dense {
  float *q, *grad, *grad_q, *lse, *delta;
  Dense(float* space, const Shape& s) {
    int64_t rows = s.repeats() * s.padded_rows(), size = rows * s.width();
    q = space, grad = q + size, grad_q = grad + size, lse = grad_q + size, delta = lse + rows;
  }
};

// Fills one tile of rows of one head (the `local`th of its group). lse goes to units of log 2; rows that see nothing,
// and rows beyond the last, get one that makes every weight 0; delta is scale * sum(out * grad_out).
template <class T>
void open_tile(const Tensor<const T>& q, const Tensor<const T>& out, const Tensor<const T>& grad, const float* lse,
               const Shape& s, int64_t batch, int64_t head, int64_t local, int64_t tile, const Dense& dense) {
  int64_t width = s.width(), row = tile * kRows, count = std::min<int64_t>(kRows, s.rows - row);
  int64_t first = local * s.padded_rows() + row;
  float* grads = dense.grad + first * width;
  fetch(q.at(batch, head, row), q.stride(), count, kRows, s.head_dim, width, dense.q + first * width);
  fetch(grad.at(batch, head, row), grad.stride(), count, kRows, s.head_dim, width, grads);
  std::memset(dense.grad_q + first * width, 0, sizeof(float) * static_cast<size_t>(kRows * width));
  for (int64_t i = 0; i < kRows; ++i) {
    float known = i < count ? lse[(batch * s.heads + head) * s.rows + row + i] : kHidden;
    bool blind = !(known > 0.5f * kHidden);
    dense.lse[first + i] = blind ? -kHidden : known * kLog2E;
    dense.delta[first + i] =
        blind ? 0.0f : dot(grads + i * width, out.at(batch, head, row + i), s.head_dim) * s.scale;
  }
}

// grad_q of one tile of one head = the sum of those tasks' shares that saw it. Shares lie `step` floats apart, what
// they saw `seen_step` numbers.
template <class T>
void join(const float* shares, int64_t step, const int32_t* seen, int64_t seen_step, const Shape& s, int64_t batch,
          int64_t head, int64_t tile, const Tensor<T>& grad_q) {
  const float* from[kMostChunks];
  int64_t count = 0, width = s.width();
  for (int64_t chunk = 0; chunk < s.chunks(); ++chunk) {
    if (seen[chunk * seen_step] != 0) from[count++] = shares + chunk * step;
  }
  for (int64_t row = 0; row < std::min<int64_t>(kRows, s.rows - tile * kRows); ++row) {
    T* to = grad_q.at(batch, head, tile * kRows + row);
    for (int64_t c = 0; c < width; c += kLanes) {
      f32x16 total{};
      for (int64_t share = 0; share < count; ++share) total += load(from[share] + row * width + c);
      put(total, c, s.head_dim, to);
    }
  }
}

template <class T>
void backward(const T* q, const T* k, const T* v, const int32_t* intervals, const T* out, const float* lse,
              const T* grad_out, const Shape& s, T* grad_q, T* grad_k, T* grad_v, float* workspace) {
  Layout layout(s, true);
  Tensor<const T> all_q{q, s.rows, s.heads, s.head_dim}, all_grad{grad_out, s.rows, s.heads, s.head_dim};
  Tensor<const T> all_out{out, s.rows, s.heads, s.head_dim};
  Tensor<const T> all_k{k, s.columns, s.groups, s.head_dim}, all_v{v, s.columns, s.groups, s.head_dim};
  Tensor<T> to_q{grad_q, s.rows, s.heads, s.head_dim};
  Tensor<T> to_k{grad_k, s.columns, s.groups, s.head_dim}, to_v{grad_v, s.columns, s.groups, s.head_dim};

  // A task takes a chunk of the keys of one group and every query head of it. Its share of the gradient of q is summed
  // apart, because other chunks add to the same rows.
  Masks masks(intervals, s, layout, workspace);
  int64_t chunks = s.chunks(), groups = s.batch * s.groups, repeats = s.repeats(), tiles = s.tiles();
  int64_t copies = s.backward_copies(), own = BackwardBlock::space(s);
  bool near = layout.copies == Layout::kNowhere;
  auto* all_seen = reinterpret_cast<int32_t*>(workspace + layout.seen);
  parallel_for(groups * chunks, [&](int64_t task, int) {
    int64_t chunk = task / groups, index = task % groups, batch = index / s.groups, group = index % s.groups;
    int64_t first = s.blocks() * chunk / chunks, last = s.blocks() * (chunk + 1) / chunks;
    float* space = scratch(own + (near ? copies : 0));
    Dense dense(near ? space + own : workspace + layout.copies + task * copies, s);
    Mask mask = masks.of(batch, group);
    int32_t* seen = all_seen + task * tiles;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      seen[tile] = sees_any(mask, first, last, tile, s) ? 1 : 0;
      for (int64_t local = 0; local < repeats && seen[tile] != 0; ++local) {
        open_tile(all_q, all_out, all_grad, lse, s, batch, group * repeats + local, local, tile, dense);
      }
    }
    BackwardBlock worker(s, space);
    for (int64_t block = first; block < last; ++block) {
      worker.open(all_k, all_v, batch, group, block);
      for (int64_t tile = 0; tile < repeats * tiles; ++tile) {
        int64_t row = tile * kRows, at = row * s.width();
        worker.run(dense.q + at, dense.grad + at, mask, tile % tiles, dense.lse + row, dense.delta + row,
                   dense.grad_q + at);
      }
      worker.close(batch, group, to_k, to_v);
    }
    for (int64_t tile = 0; tile < repeats * tiles && chunks == 1; ++tile) {
      join(dense.grad_q + tile * kRows * s.width(), 0, seen + tile % tiles, 0, s, batch,
           group * repeats + tile / tiles, tile % tiles, to_q);
    }
  });
  if (chunks == 1) return;
  parallel_for(s.batch * s.heads * tiles, [&](int64_t task, int) {
    int64_t batch = task / tiles / s.heads, head = task / tiles % s.heads, tile = task % tiles;
    int64_t index = batch * s.groups + head / repeats;
    Dense dense(workspace + layout.copies + index * copies, s);
    join(dense.grad_q + (head % repeats * tiles + tile) * kRows * s.width(), groups * copies,
         all_seen + index * tiles + tile, groups * tiles, s, batch, head, tile, to_q);
  });
}

const bf16* halves(const uint16_t* p) { return reinterpret_cast<const bf16*>(p); }
bf16* halves(uint16_t* p) { return reinterpret_cast<bf16*>(p); }

}  // namespace
}  // namespace flashmask
}  // namespace ernie5

using ernie5::flashmask::halves;
using ernie5::flashmask::Shape;

extern "C" {

int64_t ernie5_flashmask_attention_workspace_size(int64_t batch, int64_t rows, int64_t columns, int64_t heads,
                                                  int64_t groups, int64_t head_dim, int64_t mask_heads,
                                                  int64_t backward) {
  Shape s{batch, rows, columns, heads, groups, head_dim, mask_heads, 4, false, 0, 1.0f};
  return ernie5::flashmask::Layout(s, backward != 0).size;
}

void ernie5_flashmask_attention_forward_cpu_f32(const float* q, const float* k, const float* v,
                                                const int32_t* intervals, int64_t batch, int64_t rows, int64_t columns,
                                                int64_t heads, int64_t groups, int64_t head_dim, int64_t mask_heads,
                                                int64_t bounds, int64_t causal, int64_t query_start, float scale,
                                                float* out, float* lse, float* workspace) {
  Shape s{batch,  rows,        columns,    heads, groups, head_dim, mask_heads,
          bounds, causal != 0, query_start, scale};
  ernie5::flashmask::forward(q, k, v, intervals, s, out, lse, workspace);
}

void ernie5_flashmask_attention_forward_cpu_bf16(const uint16_t* q, const uint16_t* k, const uint16_t* v,
                                                 const int32_t* intervals, int64_t batch, int64_t rows,
                                                 int64_t columns, int64_t heads, int64_t groups, int64_t head_dim,
                                                 int64_t mask_heads, int64_t bounds, int64_t causal,
                                                 int64_t query_start, float scale, uint16_t* out, float* lse,
                                                 float* workspace) {
  Shape s{batch,  rows,        columns,    heads, groups, head_dim, mask_heads,
          bounds, causal != 0, query_start, scale};
  ernie5::flashmask::forward(halves(q), halves(k), halves(v), intervals, s, halves(out), lse, workspace);
}

void ernie5_flashmask_attention_backward_cpu_f32(const float* q, const float* k, const float* v,
                                                 const int32_t* intervals, const float* out, const float* lse,
                                                 const float* grad_out, int64_t batch, int64_t rows, int64_t columns,
                                                 int64_t heads, int64_t groups, int64_t head_dim, int64_t mask_heads,
                                                 int64_t bounds, int64_t causal, int64_t query_start, float scale,
                                                 float* grad_q, float* grad_k, float* grad_v, float* workspace) {
  Shape s{batch,  rows,        columns,    heads, groups, head_dim, mask_heads,
          bounds, causal != 0, query_start, scale};
  ernie5::flashmask::backward(q, k, v, intervals, out, lse, grad_out, s, grad_q, grad_k, grad_v, workspace);
}

void ernie5_flashmask_attention_backward_cpu_bf16(const uint16_t* q, const uint16_t* k, const uint16_t* v,
                                                  const int32_t* intervals, const uint16_t* out, const float* lse,
                                                  const uint16_t* grad_out, int64_t batch, int64_t rows,
                                                  int64_t columns, int64_t heads, int64_t groups, int64_t head_dim,
                                                  int64_t mask_heads, int64_t bounds, int64_t causal,
                                                  int64_t query_start, float scale, uint16_t* grad_q, uint16_t* grad_k,
                                                  uint16_t* grad_v, float* workspace) {
  Shape s{batch,  rows,        columns,    heads, groups, head_dim, mask_heads,
          bounds, causal != 0, query_start, scale};
  ernie5::flashmask::backward(halves(q), halves(k), halves(v), intervals, halves(out), lse, halves(grad_out), s,
                              halves(grad_q), halves(grad_k), halves(grad_v), workspace);
}

}  // extern "C"
