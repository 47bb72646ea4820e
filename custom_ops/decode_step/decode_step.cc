#include "decode_step/decode_step.h"

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <new>
#include <optional>
#include <vector>

#include "common/parallel.h"
#include "common/simd.h"
#include "decode_step/choose.h"
#include "decode_step/matrix_unit.h"

namespace ernie5 {
namespace {

constexpr int64_t kLanes = 16;
constexpr int64_t kTokenBlock = 16;  // tokens that share one pass over a piece of weights
constexpr int64_t kFewTokens = 2;    // up to here, work by token is done by one thread between two phases
constexpr int64_t kAhead = 4096;     // weights: the processor's own prefetching ends with the page; 2048 and 8192 were slower

int64_t padded(int64_t count) { return (count + kLanes - 1) / kLanes * kLanes; }

// ---------------------------------------------------------------------------------------------------------------------
// The team

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// Spins, for the phases are short; gives the core away after a while, so that more threads than cores still finish.
class Barrier {
 public:
  // The last of `threads` to arrive runs `alone` before all go on.
  template <class Alone>
  void wait(int threads, Alone&& alone) {
    uint32_t round = round_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
      alone();
      arrived_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      return;
    }
    for (int turn = 0; round_.load(std::memory_order_acquire) == round; ++turn) {
      if (turn < kSpins) {
        pause();
      } else {
        sched_yield();
      }
    }
  }

 private:
  static constexpr int kSpins = 2000;
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> round_{0};
};

// ---------------------------------------------------------------------------------------------------------------------
// Products of few rows with a matrix

template <class W>
inline f32x16 load_columns(const W* p, int64_t count) {
  return count >= kLanes ? load(p) : load_part(p, count);
}

// A stretch of weights that is read in order, and where its reader goes on after it: without that, the first kAhead
// weights of every stretch would arrive at the memory's latency.
struct Stretch {
  const char* end;
  const char* next;

  template <class W>
  const char* ahead(const W* p) const {
    const char* line = reinterpret_cast<const char*>(p + kAhead);
    return line < end ? line : next + (line - end);
  }
};

// Asks for the lines that `count` weights from p on will need `kAhead` later.
template <class W>
inline void prefetch(const W* p, int64_t count, const Stretch& stretch) {
  const char* line = stretch.ahead(p);
  for (int64_t i = 0; i < count * static_cast<int64_t>(sizeof(W)); i += 64) __builtin_prefetch(line + i);
}

// y [tokens, ldy] (+)= x[., at .. at+R) w [R, 16*C columns from c]. The R*C vectors of weights stay in registers.
template <class W, int R, int C>
inline void multiply_block(const W* w, int64_t ld, int64_t left, const float* const* x, int64_t at, int64_t tokens,
                           float* y, int64_t ldy, bool fresh, const Stretch& stretch) {
  f32x16 weights[R][C];
  for (int r = 0; r < R; ++r) {
    prefetch(w + r * ld, C * kLanes, stretch);
    for (int c = 0; c < C; ++c) weights[r][c] = load_columns(w + r * ld + c * kLanes, left - c * kLanes);
  }
  for (int64_t t = 0; t < tokens; ++t) {
    const float* row = x[t] + at;
    float* target = y + t * ldy;
    f32x16 total[C];
    for (int c = 0; c < C; ++c) total[c] = fresh ? f32x16{} : load(target + c * kLanes);
    for (int r = 0; r < R; ++r) {
      for (int c = 0; c < C; ++c) total[c] += weights[r][c] * row[r];
    }
    for (int c = 0; c < C; ++c) store(target + c * kLanes, total[c]);
  }
}

template <class W, int R>
inline void multiply_rows(const W* w, int64_t columns, const float* const* x, int64_t at, int64_t tokens, float* y,
                          int64_t ldy, bool fresh, const Stretch& stretch) {
  int64_t c = 0;
  for (; c + 2 * kLanes <= columns; c += 2 * kLanes) {
    multiply_block<W, R, 2>(w + c, columns, 2 * kLanes, x, at, tokens, y + c, ldy, fresh, stretch);
  }
  for (; c < columns; c += kLanes) {
    multiply_block<W, R, 1>(w + c, columns, columns - c, x, at, tokens, y + c, ldy, fresh, stretch);
  }
}

// y [tokens, ldy] = x[., begin .. end) w[begin .. end): memory is read in order, eight rows at a time.
template <class W>
void multiply_piece(const void* matrix, int64_t columns, const float* const* x, int64_t begin, int64_t end,
                    int64_t tokens, float* y, int64_t ldy, const void* next) {
  const W* w = static_cast<const W*>(matrix);
  Stretch stretch{reinterpret_cast<const char*>(w + end * columns), static_cast<const char*>(next)};
  int64_t d = begin;
  for (; d + 8 <= end; d += 8) multiply_rows<W, 8>(w + d * columns, columns, x, d, tokens, y, ldy, d == begin, stretch);
  for (; d < end; ++d) multiply_rows<W, 1>(w + d * columns, columns, x, d, tokens, y, ldy, d == begin, stretch);
}

using Multiply = decltype(&multiply_piece<float>);

// The same on the matrix unit, which the thread holds, where that pays.
void multiply_on_unit(const void* matrix, int64_t columns, const float* const* x, int64_t begin, int64_t end,
                      int64_t tokens, float* y, int64_t ldy, const void* next) {
#if defined(ERNIE5_AMX)
  const bf16* w = static_cast<const bf16*>(matrix) + begin * columns;
  if (amx::multiply_few(w, columns, x, begin, end - begin, tokens, y, ldy, next)) return;
#endif
  multiply_piece<bf16>(matrix, columns, x, begin, end, tokens, y, ldy, next);
}

// Whether the matrix unit serves a step of so many tokens.
bool on_unit([[maybe_unused]] bool half, [[maybe_unused]] int64_t tokens) {
#if defined(ERNIE5_AMX)
  return half && tokens >= amx::kFew && has_matrix_unit();
#else
  return false;
#endif
}

// x [tokens, depth] w [depth, columns], cut into pieces of rows so that every thread streams contiguous memory; the
// partial results y [pieces, tokens, ldy] are added where they are used. Pieces depend on the shapes, not on the
// number of threads, and so do the bits of the result.
struct Product {
  Multiply multiply;
  const void* weights;
  int64_t weight_size;  // bytes
  const float* const* x;
  int64_t tokens, depth, columns, pieces;
  float* y;

  int64_t ldy() const { return padded(columns); }
  int64_t blocks() const { return (tokens + kTokenBlock - 1) / kTokenBlock; }
  int64_t tasks() const { return blocks() * pieces; }
  int64_t size() const { return pieces * tokens * ldy(); }

  int64_t begin_of(int64_t piece) const { return std::min(piece * ((depth / pieces + 7) / 8 * 8), depth); }

  // Where the weights of a task begin.
  const void* weights_of(int64_t task) const {
    return static_cast<const char*>(weights) + begin_of(task / blocks()) * columns * weight_size;
  }

  // `next`: where this thread reads on afterwards.
  void run(int64_t task, const void* next) const {
    int64_t piece = task / blocks(), start = task % blocks() * kTokenBlock;
    int64_t begin = begin_of(piece), end = piece + 1 == pieces ? depth : begin_of(piece + 1);
    int64_t count = std::min(kTokenBlock, tokens - start);
    float* target = y + (piece * tokens + start) * ldy();
    if (begin == end) {
      std::memset(target, 0, static_cast<size_t>(count * ldy()) * sizeof(float));
      return;
    }
    multiply(weights, columns, x + start, begin, end, count, target, ldy(), next);
  }
};

int64_t pieces_of(int64_t depth, int64_t tokens) {
  int64_t wanted = tokens <= kTokenBlock ? 4 : tokens <= 4 * kTokenBlock ? 2 : 1;
  return std::max<int64_t>(1, std::min(wanted, depth / 32));
}

// Where the partial results of one row lie.
struct Parts {
  const float* first = nullptr;
  int64_t step = 0, pieces = 0;

  f32x16 at(int64_t c) const {
    f32x16 total = load(first + c);
    for (int64_t piece = 1; piece < pieces; ++piece) total += load(first + piece * step + c);
    return total;
  }
};

Parts parts_of(const Product& product, int64_t token) {
  return {product.y + token * product.ldy(), product.tokens * product.ldy(), product.pieces};
}

// ---------------------------------------------------------------------------------------------------------------------
// Sums along rows

template <int... I>
inline f32x16 pick(f32x16 a, f32x16 b) {
  return __builtin_shufflevector(a, b, I...);
}

// Lane r of the result is the sum of v[r].
inline f32x16 sums(f32x16* v) {
  for (int i = 0; i < 8; ++i) {
    v[i] = pick<0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23>(v[i], v[i + 8]) +
           pick<8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31>(v[i], v[i + 8]);
  }
  for (int i = 0; i < 4; ++i) {
    v[i] = pick<0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27>(v[i], v[i + 4]) +
           pick<4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31>(v[i], v[i + 4]);
  }
  for (int i = 0; i < 2; ++i) {
    v[i] = pick<0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29>(v[i], v[i + 2]) +
           pick<2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31>(v[i], v[i + 2]);
  }
  return pick<0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30>(v[0], v[1]) +
         pick<1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31>(v[0], v[1]);
}

// Dot products of `R` rows of w (ld apart) with `M` vectors x (ldx apart), into totals [M][R].
template <class W, int R, int M>
inline void dots(const W* w, int64_t ld, const float* x, int64_t ldx, int64_t depth, f32x16 (&totals)[M][R]) {
  for (int m = 0; m < M; ++m) {
    for (int r = 0; r < R; ++r) totals[m][r] = f32x16{};
  }
  int64_t d = 0;
  for (; d + kLanes <= depth; d += kLanes) {
    f32x16 values[M];
    for (int m = 0; m < M; ++m) values[m] = load(x + m * ldx + d);
    for (int r = 0; r < R; ++r) {
      __builtin_prefetch(w + r * ld + d + kAhead);
      f32x16 weights = load(w + r * ld + d);
      for (int m = 0; m < M; ++m) totals[m][r] += weights * values[m];
    }
  }
  if (d == depth) return;
  for (int r = 0; r < R; ++r) {
    f32x16 weights = load_part(w + r * ld + d, depth - d);
    for (int m = 0; m < M; ++m) totals[m][r] += weights * load_part(x + m * ldx + d, depth - d);
  }
}

template <class W>
inline float dot(const W* w, const float* x, int64_t depth) {
  f32x16 total[1][1];
  dots<W, 1, 1>(w, 0, x, 0, depth, total);
  return sum(total[0][0]);
}

// ---------------------------------------------------------------------------------------------------------------------
// Memory that is kept from call to call

class Scratch {
 public:
  ~Scratch() { std::free(memory_); }
  void reserve(size_t bytes) {
    if (bytes <= size_) return;
    std::free(memory_);
    size_ = 0;
    memory_ = static_cast<char*>(std::aligned_alloc(64, (bytes + 4095) / 4096 * 4096));
    if (memory_ == nullptr) throw std::bad_alloc();
    size_ = bytes;
  }
  void start() { used_ = 0; }
  template <class T>
  T* take(int64_t count) {
    T* result = reinterpret_cast<T*>(memory_ + used_);
    used_ += bytes<T>(count);
    return result;
  }
  template <class T>
  static size_t bytes(int64_t count) {
    return (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
  }

 private:
  char* memory_ = nullptr;
  size_t size_ = 0, used_ = 0;
};

// First measures what a layout of arrays takes (no memory yet), then hands it out: one function describes both.
class Layout {
 public:
  explicit Layout(Scratch* scratch) : scratch_(scratch) {}
  template <class T>
  void operator()(T*& array, int64_t count) {
    if (scratch_ == nullptr) {
      total += Scratch::bytes<T>(count);
    } else {
      array = scratch_->take<T>(count);
    }
  }
  size_t total = 0;

 private:
  Scratch* scratch_;
};

struct Span {
  int32_t begin, end;
};

// ---------------------------------------------------------------------------------------------------------------------
// The step

struct Model {
  explicit Model(const int64_t* values)
      : half(values[kHalfWeights] != 0),
        layer_count(values[kLayers]),
        hidden(values[kHidden]),
        heads(values[kHeads]),
        groups(values[kGroups]),
        dim(values[kHeadDim]),
        experts(values[kExperts]),
        top_k(values[kTopK]),
        width(values[kWidth]),
        shared(values[kSharedWidth]),
        vocabulary(values[kVocabulary]),
        softmax(values[kSoftmax] != 0),
        eps(static_cast<float>(real(values[kEpsBits]))),
        scale(static_cast<float>(real(values[kScaleBits]))),
        frequencies(reinterpret_cast<const float*>(values[kFrequencies])),
        final_norm(reinterpret_cast<const float*>(values[kFinalNorm])),
        embedding(reinterpret_cast<const void*>(values[kEmbedding])),
        layers(values + kModelHeader) {}

  static double real(int64_t bits) {
    double value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }
  const void* pointer(int64_t layer, LayerPointer which) const {
    return reinterpret_cast<const void*>(layers[layer * kLayerPointers + which]);
  }
  const float* floats(int64_t layer, LayerPointer which) const {
    return static_cast<const float*>(pointer(layer, which));
  }

  bool half;
  int64_t layer_count, hidden, heads, groups, dim, experts, top_k, width, shared, vocabulary;
  bool softmax;
  float eps, scale;
  const float* frequencies;
  const float* final_norm;
  const void* embedding;
  const int64_t* layers;
};

struct Inputs {
  const int64_t* cache;
  const float* hidden;
  int64_t* ids;  // written to where text follows
  const float* positions;
  const int32_t* intervals;
  int64_t columns;
  const uint8_t* valid;
  int64_t batch, rows;
  int64_t stride, id_stride, out_stride;  // rows from one sequence to the next: of positions and valid, ids, and out
  int64_t query_start, first, last;
  bool keys_only;  // the last of the layers leaves its keys and values in the cache and nothing else
  float* out;      // hidden states on the way; where neither hidden nor ids are given, they are there already
  float* logits;
};

// How text goes on after each row: see ernie5_decode_text_cpu.
struct Text {
  int64_t count;
  const uint8_t* following;
  const uint8_t* missing;
  int64_t width, end, left;
  Sampling sampling;
  const double* uniforms;
  int64_t* states;
  int64_t* chosen;
};

void rms_norm(const float* x, const float* weight, int64_t size, float eps, float* y) {
  f32x16 squares{};
  for (int64_t c = 0; c < size; c += kLanes) {
    f32x16 value = load_columns(x + c, size - c);
    squares += value * value;
  }
  float inverse = 1.0f / std::sqrt(sum(squares) / static_cast<float>(size) + eps);
  for (int64_t c = 0; c < size; c += kLanes) {
    f32x16 value = load_columns(x + c, size - c) * inverse * load_columns(weight + c, size - c);
    store_part(y + c, value, std::min(kLanes, size - c));
  }
}

// h = gate / (1 + e^-gate) * up * weight; gate and up are the two halves of the row in `parts`.
void swiglu(const Parts& parts, int64_t width, float weight, float* h) {
  auto activate = [weight](f32x16 gate, f32x16 up) { return gate / (1.0f + exp(-gate)) * up * weight; };
  int64_t c = 0;
  for (; c + kLanes <= width; c += kLanes) store(h + c, activate(parts.at(c), parts.at(width + c)));
  for (; c < width; ++c) {
    f32x16 gate = splat(0.0f), up = splat(0.0f);
    for (int64_t piece = 0; piece < parts.pieces; ++piece) {
      gate[0] += parts.first[piece * parts.step + c];
      up[0] += parts.first[piece * parts.step + width + c];
    }
    h[c] = activate(gate, up)[0];
  }
}

class Step {
 public:
  // `text`: null, or what follows these rows, of which there is one a sequence; then in.ids is written to.
  Step(const Model& model, const Inputs& inputs, Scratch& scratch, const Text* text = nullptr)
      : m(model),
        in(inputs),
        text(text),
        tokens(in.batch * in.rows),
        seen(in.query_start + (text != nullptr ? text->count : in.rows)),
        assignments(tokens * m.top_k),
        unit(on_unit(m.half, tokens)),
        multiply(unit ? &multiply_on_unit : m.half ? &multiply_piece<bf16> : &multiply_piece<float>),
        threads(num_threads()) {
    Layout sizes(nullptr);
    lay_out(sizes);
    scratch.reserve(sizes.total);
    scratch.start();
    Layout arrays(&scratch);
    lay_out(arrays);
    products = products_memory;
  }

  void run() {
    on_threads(threads, [this](int thread) {
      int size = granted_threads(threads);
      std::optional<MatrixUnit> held;
      if (unit) held.emplace();
      text != nullptr ? write(thread, size) : work(thread, size);
    });
  }

  // Tokens of every sequence that `write` chose.
  int64_t written() const { return written_; }

 private:
  void lay_out(Layout& array) {
    int64_t pieces = pieces_of(1 << 20, tokens), ldh = padded(m.hidden);
    array(normed, tokens * ldh);
    array(normed_rows, tokens);
    array(angles, tokens * m.dim);
    array(spans, tokens * (seen / 2 + 1));
    array(span_count, tokens);
    array(dense, pieces * tokens * std::max(padded(m.heads * m.dim) + 2 * padded(m.groups * m.dim), ldh));
    array(queries, tokens * m.heads * m.dim);
    array(attended, tokens * padded(m.heads * m.dim));
    array(attended_rows, tokens);
    array(scores, threads * 4 * padded(seen));
    array(router, pieces * tokens * padded(m.experts));
    array(ranking, tokens * padded(m.experts));
    array(left, tokens * padded(m.experts));
    array(experts, assignments);
    array(weights, assignments);
    array(offsets, m.experts + 1);
    array(slots, assignments);
    array(gate_up, pieces * assignments * padded(2 * m.width));
    array(gate_up_parts, assignments);
    array(activated, assignments * padded(m.width));
    array(expert_rows, assignments);
    array(activated_rows, assignments);
    array(down, pieces * assignments * ldh);
    array(down_parts, assignments);
    array(shared_gate_up, pieces * tokens * padded(2 * m.shared));
    array(shared_activated, tokens * padded(m.shared));
    array(shared_rows, tokens);
    array(shared_down, pieces * tokens * ldh);
    array(products_memory, m.experts + 2);
    array(choice, text != nullptr ? tokens * 2 * padded(m.vocabulary) : 0);
  }

  // --- phases ---

  // Everyone takes tasks until none is left.
  template <class Body>
  void share(int64_t count, Body&& body) {
    for (;;) {
      int64_t task = next.fetch_add(1, std::memory_order_relaxed);
      if (task >= count) return;
      body(task);
    }
  }

  // Ends a phase; the last thread to arrive prepares the next one with `alone`.
  template <class Alone>
  void meet(int size, Alone&& alone) {
    barrier.wait(size, [&] {
      alone();
      next.store(0, std::memory_order_relaxed);
    });
  }

  // Ends a phase, does body(token) for every token, then `alone` once.
  template <class Body, class Alone>
  void by_token(int size, Body&& body, Alone&& alone) {
    if (tokens <= kFewTokens || size == 1) {
      meet(size, [&] {
        for (int64_t t = 0; t < tokens; ++t) body(t);
        alone();
      });
      return;
    }
    meet(size, [] {});
    share(tokens, body);
    meet(size, alone);
  }

  // All products, by all threads; each knows a task ahead what it reads next. `after`: what the next phase reads.
  void multiply_all(const void* after) {
    int64_t total = 0;
    for (int64_t i = 0; i < product_count; ++i) total += products[i].tasks();
    int64_t index = 0, before = 0;
    auto locate = [&](int64_t task) {  // called with ascending tasks
      while (task >= before + products[index].tasks()) before += products[index++].tasks();
    };
    int64_t task = next.fetch_add(1, std::memory_order_relaxed);
    while (task < total) {
      locate(task);
      const Product& product = products[index];
      int64_t inside = task - before;
      task = next.fetch_add(1, std::memory_order_relaxed);
      if (task < total) locate(task);
      product.run(inside, task < total ? products[index].weights_of(task - before) : after);
    }
  }

  void work(int thread, int size) {
    by_token(size, [this](int64_t t) { start(t); }, [this] { project(in.first); });
    for (int64_t layer = in.first; layer < in.last; ++layer) {
      if (in.keys_only && layer + 1 == in.last) {
        multiply_all(nullptr);
        by_token(size, [=](int64_t t) { place_keys(layer, t, products[0], products[1]); }, [] {});
        return;
      }
      multiply_all(m.pointer(layer, kOut));
      by_token(size, [=](int64_t t) { place(layer, t); }, [] {});
      int64_t sharing = tokens * m.groups >= size ? m.heads / m.groups : 1;  // heads of one task
      attend_all(layer, sharing, thread);
      meet(size, [=] { project_back(layer); });
      multiply_all(m.pointer(layer, kRouter));
      by_token(
          size, [=](int64_t t) { after_attention(layer, t); }, [=] { look_for_experts(layer); });
      multiply_all(m.pointer(layer, kSharedDown));
      by_token(
          size, [=](int64_t t) { choose(layer, t); }, [=] { open_experts(layer); });
      multiply_all(m.pointer(layer, kDown));
      by_token(
          size, [=](int64_t t) { activate(t); }, [=] { close_experts(layer); });
      multiply_all(layer + 1 < in.last ? m.pointer(layer + 1, kQuery) : m.embedding);
      by_token(
          size, [=](int64_t t) { finish(layer, t); },
          [=] {
            if (layer + 1 < in.last) project(layer + 1);
          });
    }
    if (in.logits != nullptr) head();
  }

  // Row after row of text, each token chosen from the logits of the row before.
  void write(int thread, int size) {
    while (written_ < text->count && !finished) {
      work(thread, size);
      by_token(size, [this](int64_t b) { choose_token(b); }, [this] { advance(); });
    }
  }

  bool ended(int64_t b) const { return text != nullptr && in.ids[b] == text->end; }

  void choose_token(int64_t b) {
    int64_t* chosen = text->chosen + b * text->count + written_;
    *chosen = text->end;
    if (ended(b)) return;
    const uint8_t* missing = text->missing + text->states[b] * text->width;
    int limit = static_cast<int>(std::min(text->left - written_, kNever - 1));
    float* memory = choice + b * 2 * padded(m.vocabulary);
    double uniform = text->uniforms != nullptr ? text->uniforms[b * text->count + written_] : 0.0;
    int64_t id = ernie5::choose(in.logits + b * m.vocabulary, missing, limit, text->width, text->sampling, uniform, memory);
    *chosen = id >= 0 ? id : text->end;
    text->states[b] = text->following[text->states[b] * text->width + *chosen];
  }

  void advance() {
    finished = true;
    for (int64_t b = 0; b < in.batch; ++b) {
      in.ids[b] = text->chosen[b * text->count + written_];
      finished = finished && ended(b);
    }
    ++written_;
    ++in.query_start;
    ++in.valid;
    in.positions += 3;
  }

  // --- the start ---

  float* state(int64_t t) { return in.out + (t / in.rows * in.out_stride + t % in.rows) * m.hidden; }

  // Where positions and valid hold a token.
  int64_t given(int64_t t) const { return t / in.rows * in.stride + t % in.rows; }

  void start(int64_t t) {
    normed_rows[t] = normed + t * padded(m.hidden);
    attended_rows[t] = attended + t * padded(m.heads * m.dim);
    shared_rows[t] = shared_activated + t * padded(m.shared);
    if (in.ids != nullptr) {
      look_up(in.ids[t / in.rows * in.id_stride + t % in.rows], state(t));
    } else if (in.hidden != nullptr) {
      std::memcpy(state(t), in.hidden + t * m.hidden, static_cast<size_t>(m.hidden) * sizeof(float));
    }
    turn(t);
    find_spans(t);
    if (in.first < in.last) norm(in.first, kAttentionNorm, t);
  }

  void look_up(int64_t id, float* x) {
    if (!m.half) {
      const float* row = static_cast<const float*>(m.embedding) + id * m.hidden;
      std::memcpy(x, row, static_cast<size_t>(m.hidden) * sizeof(float));
      return;
    }
    const bf16* row = static_cast<const bf16*>(m.embedding) + id * m.hidden;
    for (int64_t d = 0; d < m.hidden; ++d) x[d] = to_float(row[d]);
  }

  // cos and sin of every pair, one after the other.
  void turn(int64_t t) {
    const float* position = in.positions + given(t) * 3;
    float* table = angles + t * m.dim;
    int64_t pairs = m.dim / 2;
    for (int64_t i = 0; i < pairs; ++i) {
      float angle = 0.0f;
      for (int axis = 0; axis < 3; ++axis) angle += position[axis] * m.frequencies[axis * pairs + i];
      table[2 * i] = std::cos(angle);
      table[2 * i + 1] = std::sin(angle);
    }
  }

  // The columns a row sees, as spans: the same for every layer and head.
  void find_spans(int64_t t) {
    const int32_t* interval = in.intervals + t / in.rows * in.columns * 4;
    int32_t row = static_cast<int32_t>(in.query_start + t % in.rows);
    Span* found = spans + t * (seen / 2 + 1);
    int64_t count = 0;
    bool open = false;
    int64_t now = in.query_start + in.rows;
    for (int64_t j = 0; j < now; ++j, interval += 4) {
      bool hidden = (row >= interval[0] && row < interval[1]) || (row >= interval[2] && row < interval[3]);
      if (!hidden && !open) found[count].begin = static_cast<int32_t>(j);
      if (hidden && open) found[count++].end = static_cast<int32_t>(j);
      open = !hidden;
    }
    if (open) found[count++].end = static_cast<int32_t>(now);
    span_count[t] = count;
  }

  void norm(int64_t layer, LayerPointer which, int64_t t) {
    rms_norm(state(t), m.floats(layer, which), m.hidden, m.eps, normed + t * padded(m.hidden));
  }

  // --- attention ---

  void project(int64_t layer) {
    product_count = 0;
    float* y = dense;
    for (LayerPointer which : {kQuery, kKey, kValue}) {
      if (which == kQuery && in.keys_only && layer + 1 == in.last) continue;
      int64_t columns = (which == kQuery ? m.heads : m.groups) * m.dim;
      products[product_count++] = product(m.pointer(layer, which), normed_rows, m.hidden, columns, y);
      y += products[product_count - 1].size();
    }
  }

  void project_back(int64_t layer) {
    products[0] = product(m.pointer(layer, kOut), attended_rows, m.heads * m.dim, m.hidden, dense);
    product_count = 1;
  }

  int64_t weight_size() const { return m.half ? 2 : 4; }

  // Every token times one matrix.
  Product product(const void* w, const float* const* x, int64_t depth, int64_t columns, float* y) const {
    return {multiply, w, weight_size(), x, tokens, depth, columns, pieces_of(depth, tokens), y};
  }

  float* cached(int64_t layer, int64_t which, int64_t b) const {
    float* start = reinterpret_cast<float*>(in.cache[kCacheHeader + 2 * layer + which]);
    return start + b * in.cache[kCapacity] * m.groups * m.dim;
  }

  // Rotates queries and keys; keys and values go to their row of the cache.
  void place(int64_t layer, int64_t t) {
    float* q = queries + t * m.heads * m.dim;
    float shrink = 1.0f / std::sqrt(static_cast<float>(m.dim));
    gather(parts_of(products[0], t), m.heads * m.dim, q);
    for (int64_t head = 0; head < m.heads; ++head) rotate(q + head * m.dim, angles + t * m.dim, shrink);
    place_keys(layer, t, products[1], products[2]);
  }

  void place_keys(int64_t layer, int64_t t, const Product& key, const Product& value) {
    int64_t size = m.groups * m.dim, row = in.query_start + t % in.rows;
    float* k = cached(layer, 0, t / in.rows) + row * size;
    gather(parts_of(key, t), size, k);
    gather(parts_of(value, t), size, cached(layer, 1, t / in.rows) + row * size);
    for (int64_t head = 0; head < m.groups; ++head) rotate(k + head * m.dim, angles + t * m.dim, 1.0f);
  }

  static void gather(const Parts& parts, int64_t count, float* to) {
    int64_t c = 0;
    for (; c + kLanes <= count; c += kLanes) store(to + c, parts.at(c));
    if (c < count) store_part(to + c, parts.at(c), count - c);
  }

  void rotate(float* x, const float* table, float factor) const {
    for (int64_t i = 0; i < m.dim; i += 2) {
      float even = x[i] * factor, odd = x[i + 1] * factor, cosine = table[i], sine = table[i + 1];
      x[i] = even * cosine - odd * sine;
      x[i + 1] = odd * cosine + even * sine;
    }
  }

  // All rows and heads, by all threads; each knows a task ahead whose keys it reads next.
  void attend_all(int64_t layer, int64_t sharing, int thread) {
    int64_t count = tokens * (m.heads / sharing), task = next.fetch_add(1, std::memory_order_relaxed);
    while (task < count) {
      int64_t after = next.fetch_add(1, std::memory_order_relaxed);
      attend(layer, task, sharing, thread, after < count ? keys_of(layer, after, sharing) : nullptr);
      task = after;
    }
  }

  // Where the keys of a task begin; its values lie the same way in the other half of the cache.
  const float* keys_of(int64_t layer, int64_t task, int64_t sharing, int64_t which = 0) const {
    int64_t t = task / (m.heads / sharing), head = task % (m.heads / sharing) * sharing;
    return cached(layer, which, t / in.rows) + head / (m.heads / m.groups) * m.dim;
  }

  // `sharing` query heads of one row, which all read one key head. `after`: keys that are read next.
  void attend(int64_t layer, int64_t task, int64_t sharing, int thread, const float* after) {
    int64_t t = task / (m.heads / sharing), head = task % (m.heads / sharing) * sharing;
    const float* k = keys_of(layer, task, sharing);
    const float* v = keys_of(layer, task, sharing, 1);
    float* mine = scores + thread * 4 * padded(seen);
    const float* q = queries + (t * m.heads + head) * m.dim;
    float* out = attended_row(t) + head * m.dim;
    int64_t done = 0;
    for (; done + 4 <= sharing; done += 4) attend_heads<4>(t, q + done * m.dim, k, v, mine, out + done * m.dim, after);
    for (; done < sharing; ++done) attend_heads<1>(t, q + done * m.dim, k, v, mine, out + done * m.dim, after);
  }

  float* attended_row(int64_t t) { return attended + t * padded(m.heads * m.dim); }

  template <int H>
  void attend_heads(int64_t t, const float* q, const float* k, const float* v, float* mine, float* out,
                    const float* after) {
    const Span* found = spans + t * (seen / 2 + 1);
    int64_t count = span_count[t], ld = m.groups * m.dim, size = padded(seen);
    float highest[H], factor[H];
    for (float& value : highest) value = -INFINITY;
    for (int64_t i = 0; i < count; ++i) score<H>(q, k, v, ld, found[i], mine, size, highest);
    if (after != nullptr) prefetch_rows(after, ld, kAhead / ld + 1);  // from there on `dots` does it
    for (int head = 0; head < H; ++head) {
      f32x16 total{};
      float* row = mine + head * size;
      for (int64_t i = 0; i < count; ++i) {
        for (int64_t j = found[i].begin; j < found[i].end; j += kLanes) {
          int64_t some = std::min<int64_t>(kLanes, found[i].end - j);
          f32x16 value = exp(load_part_fast(row + j, some) - highest[head]);
          store_part_fast(row + j, value, some);
          total += value;
        }
      }
      factor[head] = count > 0 ? 1.0f / sum(total) : 0.0f;
    }
    int64_t c = 0;
    for (; c + 4 * kLanes <= m.dim; c += 4 * kLanes) mix<H, 4>(v + c, ld, found, count, mine, size, factor, out + c);
    for (; c + kLanes <= m.dim; c += kLanes) mix<H, 1>(v + c, ld, found, count, mine, size, factor, out + c);
    for (; c < m.dim; ++c) mix_one<H>(v + c, ld, found, count, mine, size, factor, out + c);
  }

  static f32x16 load_part_fast(const float* p, int64_t count) {
    return count == kLanes ? load(p) : load_part(p, count, -INFINITY);
  }
  static void store_part_fast(float* p, f32x16 v, int64_t count) {
    if (count == kLanes) {
      store(p, v);
    } else {
      store_part(p, v, count);
    }
  }

  // `count` rows of one head of the cache.
  void prefetch_rows(const float* row, int64_t ld, int64_t count) const {
    for (int64_t j = 0; j < count; ++j, row += ld) {
      for (int64_t d = 0; d < m.dim; d += kLanes) __builtin_prefetch(row + d, 0, 2);
    }
  }

  // mine[head][j] = q[head] . k[j] over the span; raises `highest`. The values are asked for meanwhile.
  template <int H>
  void score(const float* q, const float* k, const float* v, int64_t ld, Span span, float* mine, int64_t size, float* highest) const {
    constexpr int kRows = kLanes / H;
    int64_t j = span.begin;
    for (; j + kRows <= span.end; j += kRows) {
      prefetch_rows(v + j * ld, ld, kRows);
      f32x16 totals[H][kRows];
      dots<float, kRows, H>(k + j * ld, ld, q, m.dim, m.dim, totals);
      f32x16 values = sums(totals[0]);
      for (int head = 0; head < H; ++head) {
        for (int row = 0; row < kRows; ++row) {
          mine[head * size + j + row] = values[head * kRows + row];
          highest[head] = std::max(highest[head], values[head * kRows + row]);
        }
      }
    }
    for (; j < span.end; ++j) {
      for (int head = 0; head < H; ++head) {
        float value = dot(k + j * ld, q + head * m.dim, m.dim);
        mine[head * size + j] = value;
        highest[head] = std::max(highest[head], value);
      }
    }
  }

  // out[head][0 .. 16*C) = factor[head] * sum over j of mine[head][j] v[j][0 .. 16*C)
  template <int H, int C>
  void mix(const float* v, int64_t ld, const Span* found, int64_t count, const float* mine, int64_t size,
           const float* factor, float* out) const {
    f32x16 total[H][C] = {};
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t j = found[i].begin; j < found[i].end; ++j) {
        for (int c = 0; c < C; ++c) {
          f32x16 value = load(v + j * ld + c * kLanes);
          for (int head = 0; head < H; ++head) total[head][c] += value * mine[head * size + j];
        }
      }
    }
    for (int head = 0; head < H; ++head) {
      for (int c = 0; c < C; ++c) store(out + head * m.dim + c * kLanes, total[head][c] * factor[head]);
    }
  }

  template <int H>
  void mix_one(const float* v, int64_t ld, const Span* found, int64_t count, const float* mine, int64_t size,
               const float* factor, float* out) const {
    for (int head = 0; head < H; ++head) {
      float total = 0.0f;
      for (int64_t i = 0; i < count; ++i) {
        for (int64_t j = found[i].begin; j < found[i].end; ++j) total += mine[head * size + j] * v[j * ld];
      }
      out[head * m.dim] = total * factor[head];
    }
  }

  // --- mixture of experts ---

  void add(const Parts& parts, float* x) const {
    int64_t c = 0;
    for (; c + kLanes <= m.hidden; c += kLanes) store(x + c, load(x + c) + parts.at(c));
    if (c < m.hidden) store_part(x + c, load_part(x + c, m.hidden - c) + parts.at(c), m.hidden - c);
  }

  void after_attention(int64_t layer, int64_t t) {
    add(parts_of(products[0], t), state(t));
    norm(layer, kMoeNorm, t);
  }

  void look_for_experts(int64_t layer) {
    products[0] = product(m.pointer(layer, kRouter), normed_rows, m.hidden, m.experts, router);
    products[0].multiply = &multiply_piece<float>;
    products[0].weight_size = 4;
    product_count = 1;
    if (m.shared == 0) return;
    const void* w = m.pointer(layer, kSharedGateUp);
    products[product_count++] = product(w, normed_rows, m.hidden, 2 * m.shared, shared_gate_up);
  }

  // Scores of one token, its K experts by score + bias (of equals the lower number), their weights.
  void choose(int64_t layer, int64_t t) {
    if (m.shared > 0) swiglu(parts_of(products[1], t), m.shared, 1.0f, shared_activated + t * padded(m.shared));
    int32_t* chosen = experts + t * m.top_k;
    float* weight = weights + t * m.top_k;
    if (in.valid[given(t)] == 0 || ended(t)) {
      std::fill(chosen, chosen + m.top_k, -1);
      std::fill(weight, weight + m.top_k, 0.0f);
      return;
    }
    Parts parts = parts_of(products[0], t);
    float* score = ranking + t * padded(m.experts);
    for (int64_t e = 0; e < m.experts; e += kLanes) store(score + e, parts.at(e));
    score_all(score);
    select(score, m.floats(layer, kBias), left + t * padded(m.experts), chosen);
    float total = 0.0f;
    for (int64_t k = 0; k < m.top_k; ++k) total += score[chosen[k]];
    for (int64_t k = 0; k < m.top_k; ++k) weight[k] = score[chosen[k]] * (m.scale / std::max(total, 1e-12f));
  }

  void score_all(float* score) const {
    if (!m.softmax) {
      for (int64_t e = 0; e < m.experts; e += kLanes) store(score + e, 1.0f / (1.0f + exp(-load(score + e))));
      return;
    }
    float highest = *std::max_element(score, score + m.experts), total = 0.0f;
    for (int64_t e = 0; e < m.experts; e += kLanes) store(score + e, exp(load(score + e) - highest));
    for (int64_t e = 0; e < m.experts; ++e) total += score[e];
    for (int64_t e = 0; e < m.experts; ++e) score[e] /= total;
  }

  // `rest` [E, padded] keeps score + bias of what is left: the largest of it, at the first place that holds it.
  void select(const float* score, const float* bias, float* rest, int32_t* chosen) const {
    for (int64_t e = 0; e < m.experts; e += kLanes) {
      store(rest + e, load(score + e) + load_part(bias + e, std::min(kLanes, m.experts - e)));
    }
    std::fill(rest + m.experts, rest + padded(m.experts), -INFINITY);
    for (int64_t k = 0; k < m.top_k; ++k) {
      f32x16 highest = splat(-INFINITY);
      for (int64_t e = 0; e < m.experts; e += kLanes) highest = maximum(load(rest + e), highest);
      int64_t best = std::find(rest, rest + m.experts, largest(highest)) - rest;
      chosen[k] = static_cast<int32_t>(std::min(best, m.experts - 1));  // scores that are not numbers equal nothing
      rest[chosen[k]] = -INFINITY;
    }
  }

  // Groups the assignments by expert: rows offsets[e] .. offsets[e+1] are those of expert e.
  void group() {
    std::fill(offsets, offsets + m.experts + 1, 0);
    for (int64_t a = 0; a < assignments; ++a) {
      if (experts[a] >= 0) ++offsets[experts[a] + 1];
    }
    for (int64_t e = 0; e < m.experts; ++e) offsets[e + 1] += offsets[e];
    for (int64_t a = 0; a < assignments; ++a) {
      slots[a] = experts[a] >= 0 ? offsets[experts[a]]++ : -1;
      if (slots[a] >= 0) expert_rows[slots[a]] = normed_rows[a / m.top_k];
    }
    for (int64_t e = m.experts; e > 0; --e) offsets[e] = offsets[e - 1];
    offsets[0] = 0;
  }

  // One product for every expert that has rows; results go to `y`, their places to `parts`.
  void expert_products(const void* stack, const float* const* x, int64_t depth, int64_t columns, float* y,
                       Parts* parts) {
    // Where some tokens choose, there are enough experts to keep the threads busy; partial results would cost more.
    bool several = tokens > kFewTokens && tokens <= kTokenBlock;
    int64_t pieces = several ? 1 : pieces_of(depth, tokens), size = depth * columns * weight_size();
    for (int64_t e = 0; e < m.experts; ++e) {
      int64_t begin = offsets[e], count = offsets[e + 1] - begin;
      if (count == 0) continue;
      Product& product = products[product_count++];
      product = {multiply, static_cast<const char*>(stack) + e * size, weight_size(), x + begin, count, depth, columns, pieces, y};
      for (int64_t i = 0; i < count; ++i) parts[begin + i] = parts_of(product, i);
      y += product.size();
    }
  }

  void open_experts(int64_t layer) {
    group();
    product_count = 0;
    expert_products(m.pointer(layer, kGateUp), expert_rows, m.hidden, 2 * m.width, gate_up, gate_up_parts);
    if (m.shared == 0) return;
    shared_product = product(m.pointer(layer, kSharedDown), shared_rows, m.shared, m.hidden, shared_down);
    products[product_count++] = shared_product;
  }

  void activate(int64_t t) {
    for (int64_t a = t * m.top_k; a < (t + 1) * m.top_k; ++a) {
      if (slots[a] < 0) continue;
      float* h = activated + slots[a] * padded(m.width);
      swiglu(gate_up_parts[slots[a]], m.width, weights[a], h);
      activated_rows[slots[a]] = h;
    }
  }

  void close_experts(int64_t layer) {
    product_count = 0;
    expert_products(m.pointer(layer, kDown), activated_rows, m.width, m.hidden, down, down_parts);
  }

  void finish(int64_t layer, int64_t t) {
    if (m.shared > 0) add(parts_of(shared_product, t), state(t));
    for (int64_t a = t * m.top_k; a < (t + 1) * m.top_k; ++a) {
      if (slots[a] >= 0) add(down_parts[slots[a]], state(t));
    }
    if (layer + 1 < in.last) {
      norm(layer + 1, kAttentionNorm, t);
    } else if (in.logits != nullptr && (t + 1) % in.rows == 0) {
      rms_norm(state(t), m.final_norm, m.hidden, m.eps, normed + t / in.rows * padded(m.hidden));
    }
  }

  // --- output head ---

  void head() {
    constexpr int64_t kRows = 64;
    const uint32_t* split = split_normed();
    share((m.vocabulary + kRows - 1) / kRows, [this, split](int64_t task) {
      int64_t begin = task * kRows, end = std::min(begin + kRows, m.vocabulary);
#if defined(ERNIE5_AMX)
      const bf16* w = static_cast<const bf16*>(m.embedding);
      for (; split != nullptr && begin + amx::kWide <= end; begin += amx::kWide) {
        amx::dot_few(w + begin * m.hidden, m.hidden, split, in.batch, in.logits + begin, m.vocabulary);
      }
#endif
      if (m.half) {
        head_rows(static_cast<const bf16*>(m.embedding), begin, end);
      } else {
        head_rows(static_cast<const float*>(m.embedding), begin, end);
      }
    });
  }

  // The last rows' normed states for the matrix unit, in memory of the thread; null where it does not serve the head.
  const uint32_t* split_normed() const {
#if defined(ERNIE5_AMX)
    if (unit && in.batch >= amx::kFew && in.batch <= amx::kMany && m.hidden % amx::kDeep == 0) {
      auto* split = scratch<uint32_t, 121>(m.hidden / amx::kDeep * amx::tiles_of(in.batch) * amx::kTile);
      amx::split_right(normed, padded(m.hidden), m.hidden, in.batch, split);
      return split;
    }
#endif
    return nullptr;
  }

  template <class W>
  void head_rows(const W* w, int64_t begin, int64_t end) {
    int64_t v = begin;
    for (; v + 4 <= end; v += 4) {
      int64_t b = 0;
      for (; b + 4 <= in.batch; b += 4) head_tile<W, 4, 4>(w, v, b);
      for (; b < in.batch; ++b) head_tile<W, 4, 1>(w, v, b);
    }
    for (; v < end; ++v) {
      for (int64_t b = 0; b < in.batch; ++b) head_tile<W, 1, 1>(w, v, b);
    }
  }

  template <class W, int R, int M>
  void head_tile(const W* w, int64_t v, int64_t b) {
    int64_t ld = padded(m.hidden);
    f32x16 totals[M][R];
    dots<W, R, M>(w + v * m.hidden, m.hidden, normed + b * ld, ld, m.hidden, totals);
    for (int i = 0; i < M; ++i) {
      for (int r = 0; r < R; ++r) in.logits[(b + i) * m.vocabulary + v + r] = sum(totals[i][r]);
    }
  }

  const Model& m;
  Inputs in;
  const Text* const text;
  const int64_t tokens, seen, assignments;  // seen: rows of the cache in the end
  const bool unit;
  const Multiply multiply;
  const int threads;

  Barrier barrier;
  alignas(64) std::atomic<int64_t> next{0};
  Product* products = nullptr;
  int64_t product_count = 0;
  Product shared_product{};
  int64_t written_ = 0;
  bool finished = false;

  // Arrays of one call, see lay_out. `..._rows` are addresses of rows.
  float *normed, *angles, *dense, *queries, *attended, *scores, *router, *ranking, *left, *weights;
  float *gate_up, *activated, *down, *shared_gate_up, *shared_activated, *shared_down, *choice;
  const float **normed_rows, **attended_rows, **shared_rows, **expert_rows, **activated_rows;
  Span* spans;
  int64_t* span_count;
  int32_t *experts, *offsets, *slots;
  Parts *gate_up_parts, *down_parts;
  Product* products_memory;
};

}  // namespace
}  // namespace ernie5

namespace {

// Calls body(scratch); 1 where there was no memory.
template <class Body>
int with_scratch(Body&& body) {
  static thread_local ernie5::Scratch scratch;
  try {
    body(scratch);
  } catch (const std::bad_alloc&) {
    return 1;
  }
  return 0;
}

}  // namespace

extern "C" int ernie5_decode_step_forward_cpu(const int64_t* model, const int64_t* cache, const float* hidden,
                                              const int64_t* ids, const float* positions, const int32_t* intervals,
                                              int64_t columns, const uint8_t* valid, int64_t batch, int64_t rows,
                                              int64_t stride, int64_t query_start, int64_t first, int64_t last,
                                              float* out, float* logits) {
  if (batch <= 0 || rows <= 0) return 0;
  return with_scratch([&](ernie5::Scratch& scratch) {
    ernie5::Model shape(model);
    bool apart = logits != nullptr && rows > 1 && first < last;  // of the last layer, only the last rows are wanted
    ernie5::Inputs inputs{cache,  hidden, const_cast<int64_t*>(ids), positions, intervals, columns, valid,
                          batch,  rows,   stride, stride,   rows,  query_start, first, last,
                          apart, out, apart ? nullptr : logits};
    ernie5::Step(shape, inputs, scratch).run();
    if (!apart) return;
    inputs.hidden = nullptr;
    inputs.ids = nullptr;
    inputs.positions += 3 * (rows - 1);
    inputs.valid += rows - 1;
    inputs.rows = 1;
    inputs.query_start += rows - 1;
    inputs.first = last - 1;
    inputs.keys_only = false;
    inputs.out += (rows - 1) * shape.hidden;
    inputs.logits = logits;
    ernie5::Step(shape, inputs, scratch).run();
  });
}

extern "C" int ernie5_decode_text_cpu(const int64_t* model, const int64_t* cache, int64_t* ids, const float* positions,
                                      const int32_t* intervals, int64_t columns, const uint8_t* valid, int64_t batch,
                                      int64_t stride, int64_t query_start, int64_t count, const uint8_t* following,
                                      const uint8_t* missing, int64_t width, int64_t end, int64_t left,
                                      double temperature, int64_t top_k, double top_p, const double* uniforms,
                                      int64_t* states, int64_t* chosen, float* out, float* logits, int64_t* written) {
  *written = 0;
  if (batch <= 0 || count <= 0) return 0;
  return with_scratch([&](ernie5::Scratch& scratch) {
    ernie5::Model shape(model);
    ernie5::Inputs inputs{cache, nullptr, ids,         positions, intervals,    columns, valid, batch, 1, stride, 1,
                          1,     query_start, 0, shape.layer_count, false, out,     logits};
    ernie5::Sampling sampling{temperature, top_k, top_p};
    ernie5::Text text{count, following, missing, width, end, left, sampling, uniforms, states, chosen};
    ernie5::Step step(shape, inputs, scratch, &text);
    step.run();
    *written = step.written();
  });
}
