#include "moe_ffn/moe_ffn.h"

#include <vector>

#include "common/matrix_gemm.h"

namespace ernie5 {
namespace {

// The layer of one call. `token` maps a row (an assignment in order) to its token, null where rows are tokens.
template <class T>
struct Layer {
  const T *x, *gate_up, *down;
  const float* weights;    // of assignments; null: all one
  const int32_t* order;    // null: row r is assignment r
  const int32_t* offsets;  // null: one expert owns all rows
  const int32_t* token;
  int64_t rows, dim, experts, width;

  int64_t begin(int64_t expert) const { return offsets != nullptr ? offsets[expert] : 0; }
  int64_t end(int64_t expert) const { return offsets != nullptr ? offsets[expert + 1] : rows; }
  // Rows [first, ...) of a tensor over tokens.
  Rows<T> of_tokens(const T* tensor, int64_t first) const { return Rows<T>{tensor, dim, token}.from(first); }
  Rows<T> gate_up_of(int64_t expert) const { return {gate_up + expert * dim * 2 * width, 2 * width}; }
  Rows<T> down_of(int64_t expert) const { return {down + expert * width * dim, dim}; }
  // Whether results go past the caches: what the call touches does not fit into them.
  bool through() const {
    constexpr int64_t kCached = 2 << 20;
    return experts * 3 * weight_bytes() + rows * (dim + 2 * width) * static_cast<int64_t>(sizeof(T)) > kCached;
  }
  int64_t weight_bytes() const { return dim * width * static_cast<int64_t>(sizeof(T)); }
};

// Rows [begin, end) of one expert. `whole`: these are all of its rows.
struct Task {
  int64_t expert, begin, end;
  bool whole;
};

// What a task packs of x and of gradients should stay in the second-level cache; on the matrix unit the weights, which
// each task packs anew, count for more.
constexpr int64_t kMaxRows = 256, kSplitRows = 252, kMaxRowsPacked = 512;

// One task an expert, or several where an expert has a large share of all rows.
template <class T>
std::vector<Task> split(const Layer<T>& layer) {
  std::vector<Task> tasks;
  const int64_t share = layer.rows / (2 * num_threads());
  const bool packed = std::is_same_v<T, float> && has_matrix_unit();
  const int64_t limit = std::min(packed ? kMaxRowsPacked : kMaxRows, std::max<int64_t>(48, share));
  for (int64_t expert = 0; expert < layer.experts; ++expert) {
    const int64_t begin = layer.begin(expert), count = layer.end(expert) - begin;
    const int64_t pieces = count <= limit ? 1 : divide_up(count, packed ? limit : std::min(kSplitRows, limit));
    for (int64_t i = 0; i < pieces; ++i) {
      tasks.push_back({expert, begin + count * i / pieces, begin + count * (i + 1) / pieces, pieces == 1});
    }
  }
  return tasks;
}

// Runs body(task, ahead, unit) for every task. `ahead` covers what the task and the one after it on this thread will
// read of their weights, in the order in which they do: a forward task begins with gate_up, a backward one with down.
template <class T, class Body>
void run_tasks(const Layer<T>& layer, const std::vector<Task>& tasks, bool backward, Body&& body) {
  const int64_t count = static_cast<int64_t>(tasks.size());
  auto weights_ahead = [&](const Task& task, const Task* next) {
    Ahead ahead;
    auto bytes = [](const T* p) { return reinterpret_cast<const char*>(p); };
    auto gate_up = [&](int64_t expert) { return bytes(layer.gate_up_of(expert).data); };
    auto down = [&](int64_t expert) { return bytes(layer.down_of(expert).data); };
    const int64_t first = (backward ? 1 : 2) * layer.weight_bytes(), second = 3 * layer.weight_bytes() - first;
    if (task.whole) {
      ahead.at = backward ? gate_up(task.expert) : down(task.expert);
      ahead.end = ahead.at + second;
    }
    if (next != nullptr && next->expert != task.expert && next->end > next->begin) {
      ahead.then = backward ? down(next->expert) : gate_up(next->expert);
      ahead.then_end = ahead.then + first;
    }
    // Three lines for every 16 values of a matrix; forward products take 3 / 2 steps for them in each tile of rows, the
    // backward ones twice that, but not all of them take any along. On the matrix unit they take three steps of six
    // multiplications for every 2^15 values and row.
    const int64_t rows = std::max<int64_t>(1, task.end - task.begin);
    ahead.spread(backward ? 3 : 4, 2 * divide_up(rows, kTileRows));
    ahead.burst = std::max<int64_t>(1, (1 << 15) / 16 / 6 / (backward ? 2 : 1) / rows);
    return ahead;
  };
  const int threads = static_cast<int>(std::min<int64_t>(num_threads(), count));
  if (threads == 0) return;
  alignas(64) int64_t counter = 0;
  on_threads(threads, [&](int) {
    MatrixUnit unit;
    int64_t task = __atomic_fetch_add(&counter, 1, __ATOMIC_RELAXED);
    while (task < count) {
      const int64_t next = __atomic_fetch_add(&counter, 1, __ATOMIC_RELAXED);
      Ahead ahead = weights_ahead(tasks[task], next < count ? &tasks[next] : nullptr);
      body(tasks[task], ahead, unit);
      task = next;
    }
#if defined(__AVX512F__)
    _mm_sfence();  // after stores past the caches
#endif
  });
}

inline f32x16 sigmoid(f32x16 v) { return 1.0f / (1.0f + exp(-v)); }

// Panels of gate and of up columns, for NN products: gate panel j and up panel j.
template <class T>
struct GateUp {
  Right<T> gate, up;
};
template <class T>
GateUp<T> pack_gate_up(Rows<T> from, int64_t dim, int64_t width, Unit<T>* to) {
  if (width % kPanel == 0) {
    Right<T> both = pack_right(from, dim, 2 * width, to);
    return {both, {both[width / kPanel], both.panel, both.stride}};
  }
  return {pack_right(from, dim, width, to),
          pack_right(from.column(width), dim, width, to + right_size<T>(dim, width))};
}

// ------------------------------------------------------------------------------------------------------- forward

// Calls finish(i, j, columns, gate, up) for every panel j of a row i of the task: x gate_up, the columns of gate and
// those of up.
template <class T, class Finish>
void multiply_gate_up(const Layer<T>& layer, const Task& task, Ahead& ahead, const MatrixUnit& unit, Finish finish) {
  const int64_t count = task.end - task.begin, dim = layer.dim, width = layer.width;
  const Rows<T> x_rows = layer.of_tokens(layer.x, task.begin), gate_up = layer.gate_up_of(task.expert);
  T* both = scratch<T, 6>(count * 2 * width);
  if (thread_gemm(unit, Form::NN, count, 2 * width, dim, x_rows, gate_up, both, 2 * width, false, ahead)) {
    for (int64_t i = 0; i < count; ++i) {
      const T* row = both + i * 2 * width;
      for (int64_t j = 0; j < width; j += kPanel) {
        const int64_t columns = std::min(kPanel, width - j);
        finish(i, j, columns, get(row + j, columns), get(row + width + j, columns));
      }
    }
    return;
  }
  Left<T> x = pack_left(x_rows, count, dim, scratch<Unit<T>, 0>(left_size<T>(count, dim)));
  GateUp<T> b = pack_gate_up(gate_up, dim, width, scratch<Unit<T>, 1>(2 * right_size<T>(dim, width)));
  for (int64_t j = 0; j < width; j += kPanel) {
    const int64_t columns = std::min(kPanel, width - j);
    multiply<T>(unit, count, x, packed_units<T>(dim), b.gate[j / kPanel], b.up[j / kPanel], b.gate.stride, ahead,
                [=](int64_t i, f32x16 gate, f32x16 up) { finish(i, j, columns, gate, up); });
  }
}

// hidden (or null) and out begin at the task's first row.
template <class T>
void forward_task(const Layer<T>& layer, const Task& task, Ahead& ahead, const MatrixUnit& unit, T* hidden, T* out) {
  const int64_t count = task.end - task.begin, dim = layer.dim, width = layer.width;
  const bool through = layer.through();
  if (count == 0) return;
  // What silu(g) * u goes to is the left operand of the next product, padded like one.
  const int64_t inner = packed_units<T>(width), stride = spread(inner);
  auto* active = scratch<Unit<T>, 2>(padded_rows<T>(count) * stride);
  const int64_t padding = stride * kPerUnit<T>;  // row stride of `active` in values
  multiply_gate_up(layer, task, ahead, unit, [=](int64_t i, int64_t j, int64_t columns, f32x16 gate, f32x16 up) {
    if (hidden != nullptr) {
      put_through(hidden + i * 2 * width + j, gate, columns, through);
      put_through(hidden + i * 2 * width + width + j, up, columns, through);
    }
    // Columns past the width are zero, in both factors.
    store(reinterpret_cast<T*>(active) + i * padding + j, gate * sigmoid(gate) * up);
  });
  if (inner * kPerUnit<T> > round_up(width, kPanel)) {
    for (int64_t i = 0; i < count; ++i) {
      store(reinterpret_cast<T*>(active) + i * padding + round_up(width, kPanel), f32x16{});
    }
  }
  if (thread_gemm(unit, Form::NN, count, dim, width, Rows<T>{reinterpret_cast<const T*>(active), padding},
                  layer.down_of(task.expert), out, dim, through, ahead)) {
    return;
  }
  Right<T> down = pack_right(layer.down_of(task.expert), width, dim, scratch<Unit<T>, 1>(right_size<T>(width, dim)));
  for (int64_t j = 0; j < dim; j += 2 * kPanel) {
    const int64_t first = std::min(kPanel, dim - j), second = std::min(kPanel, dim - j - first);
    const Unit<T>* b0 = down[j / kPanel];
    multiply<T>(unit, count, {active, stride, 1}, inner, b0, second > 0 ? down[j / kPanel + 1] : b0, down.stride, ahead,
                [=](int64_t i, f32x16 p, f32x16 q) {
                  put_through(out + i * dim + j, p, first, through);
                  put_through(out + i * dim + j + kPanel, q, second, through);
                });
  }
}

// Where the row of every assignment is (-1: nowhere), and the token of every row.
struct Places {
  std::vector<int32_t> slot, token;
  int64_t rows;
  Places(const int32_t* order, const int32_t* offsets, int64_t experts, int64_t tokens, int64_t top_k)
      : slot(static_cast<size_t>(tokens * top_k), -1), rows(offsets[experts]) {
    token.resize(static_cast<size_t>(rows));
    for (int64_t r = 0; r < rows; ++r) {
      slot[static_cast<size_t>(order[r])] = static_cast<int32_t>(r);
      token[static_cast<size_t>(r)] = static_cast<int32_t>(order[r] / top_k);
    }
  }
};

// out[t] = sum over k of (weights ? weights[t,k] : 1) * rows[slot[t,k]].
template <class T>
void combine(const int32_t* slot, const float* weights, const T* rows, int64_t tokens, int64_t top_k, int64_t dim,
             T* out) {
  parallel_range(tokens, 16, 1, [&](int64_t begin, int64_t end, int) {
    for (int64_t t = begin; t < end; ++t) {
      for (int64_t j = 0; j < dim; j += 16) {
        const int64_t count = std::min<int64_t>(16, dim - j);
        f32x16 total{};
        for (int64_t a = t * top_k; a < (t + 1) * top_k; ++a) {
          if (slot[a] < 0) continue;
          f32x16 row = get(rows + slot[a] * dim + j, count);
          total += weights != nullptr ? row * weights[a] : row;
        }
        put(out + t * dim + j, total, count);
      }
    }
  });
}

template <class T>
void forward(const Layer<T>& layer, T* hidden, T* out) {
  run_tasks(layer, split(layer), false, [&](const Task& task, Ahead& ahead, const MatrixUnit& unit) {
    T* kept = hidden != nullptr ? hidden + task.begin * 2 * layer.width : nullptr;
    forward_task(layer, task, ahead, unit, kept, out + task.begin * layer.dim);
  });
}

// ------------------------------------------------------------------------------------------------------ backward

template <class T>
struct Gradients {
  const T *hidden, *grad_y;
  T* rows;  // gradients of x, a row an assignment
  float* weights;
  T *gate_up, *down, *work;
};

// What the first half of a task's backward hands to the second: the gradient of hidden [rows, 2F] and the weighted
// activation [rows, F], with these row strides.
template <class T>
struct Halfway {
  T *grad_hidden, *active;
  int64_t grad_stride, active_stride;
};

// Calls finish(i, j, columns, grad) for every panel j of a row i of the task: dy down^T, the gradient of the activation.
template <class T, class Finish>
void multiply_down(const Layer<T>& layer, const Task& task, Ahead& ahead, const MatrixUnit& unit, Left<T> dy,
                   Finish finish) {
  const int64_t count = task.end - task.begin, dim = layer.dim, width = layer.width;
  const Rows<T> dy_rows{reinterpret_cast<const T*>(dy.data), dy.row * kPerUnit<T>};
  T* grad = scratch<T, 6>(count * width);
  if (thread_gemm(unit, Form::NT, count, width, dim, dy_rows, layer.down_of(task.expert), grad, width, false, ahead)) {
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t j = 0; j < width; j += kPanel) {
        const int64_t columns = std::min(kPanel, width - j);
        finish(i, j, columns, get(grad + i * width + j, columns));
      }
    }
    return;
  }
  Right<T> down = pack_right_transposed(layer.down_of(task.expert), dim, width,
                                        scratch<Unit<T>, 1>(right_size<T>(dim, width)));
  for (int64_t j = 0; j < width; j += 2 * kPanel) {
    const int64_t first = std::min(kPanel, width - j), second = std::min(kPanel, width - j - first);
    const Unit<T>* b0 = down[j / kPanel];
    multiply<T>(unit, count, dy, packed_units<T>(dim), b0, second > 0 ? down[j / kPanel + 1] : b0, down.stride, ahead,
                [=](int64_t i, f32x16 p, f32x16 q) {
                  finish(i, j, first, p);
                  if (second > 0) finish(i, j + kPanel, second, q);
                });
  }
}

// Fills `half` and the weights' gradient of the task's rows.
template <class T>
void backward_activation(const Layer<T>& layer, const Gradients<T>& grads, const Task& task, Ahead& ahead,
                         const MatrixUnit& unit, Left<T> dy, const Halfway<T>& half) {
  const int64_t count = task.end - task.begin, width = layer.width;
  f32x16* dots = reinterpret_cast<f32x16*>(scratch<float, 3>(count * 16));
  for (int64_t i = 0; i < count; ++i) dots[i] = f32x16{};
  const T* hidden = grads.hidden + task.begin * 2 * width;
  const float* weights = layer.weights;
  const int32_t* order = layer.weights != nullptr ? layer.order + task.begin : nullptr;
  multiply_down(layer, task, ahead, unit, dy, [=](int64_t i, int64_t j, int64_t columns, f32x16 grad) {
    f32x16 gate = get(hidden + i * 2 * width + j, columns), up = get(hidden + i * 2 * width + width + j, columns);
    f32x16 s = sigmoid(gate), silu = gate * s, active = silu * up;
    dots[i] += grad * active;
    if (weights != nullptr) {
      const float weight = weights[order[i]];
      grad *= weight, active *= weight;
    }
    put(half.grad_hidden + i * half.grad_stride + j, grad * up * s * (1.0f + gate - silu), columns);
    put(half.grad_hidden + i * half.grad_stride + width + j, grad * silu, columns);
    put(half.active + i * half.active_stride + j, active, columns);
  });
  if (grads.weights == nullptr) return;
  for (int64_t i = 0; i < count; ++i) grads.weights[layer.order[task.begin + i]] = sum(dots[i]);
}

// The gradient of x: grad_hidden gate_up^T, a row an assignment.
template <class T>
void backward_input(const Layer<T>& layer, const Gradients<T>& grads, const Task& task, Ahead& ahead,
                    const MatrixUnit& unit, const Halfway<T>& half) {
  const int64_t count = task.end - task.begin, dim = layer.dim, both = 2 * layer.width;
  const bool through = layer.through();
  T* out = grads.rows + task.begin * dim;
  if (thread_gemm(unit, Form::NT, count, dim, both, Rows<T>{half.grad_hidden, half.grad_stride},
                  layer.gate_up_of(task.expert), out, dim, through, ahead)) {
    return;
  }
  Right<T> gate_up = pack_right_transposed(layer.gate_up_of(task.expert), both, dim,
                                           scratch<Unit<T>, 1>(right_size<T>(both, dim)));
  Left<T> left = pack_left(Rows<T>{half.grad_hidden, half.grad_stride}, count, both,
                           scratch<Unit<T>, 2>(left_size<T>(count, both)));
  for (int64_t j = 0; j < dim; j += 2 * kPanel) {
    const int64_t first = std::min(kPanel, dim - j), second = std::min(kPanel, dim - j - first);
    const Unit<T>* b0 = gate_up[j / kPanel];
    multiply<T>(unit, count, left, packed_units<T>(both), b0, second > 0 ? gate_up[j / kPanel + 1] : b0, gate_up.stride,
                ahead, [=](int64_t i, f32x16 p, f32x16 q) {
                  put_through(out + i * dim + j, p, first, through);
                  put_through(out + i * dim + j + kPanel, q, second, through);
                });
  }
}

// out [M,N] = a^T b over `count` rows, all of them at once: the weight gradient of an expert with few rows.
template <class T>
void small_gradient(const MatrixUnit& unit, Ahead& ahead, Rows<T> a_rows, int64_t M, Rows<T> b_rows, int64_t N,
                    int64_t count, bool through, T* out) {
  if (thread_gemm(unit, Form::TN, M, N, count, a_rows, b_rows, out, N, through, ahead)) return;
  Left<T> a = pack_left_columns(a_rows, count, M, scratch<Unit<T>, 2>(left_columns_size<T>(count, M)));
  Right<T> b = pack_right(b_rows, count, N, scratch<Unit<T>, 1>(right_size<T>(count, N)));
  constexpr int64_t kStrip = 96;  // the strip of `a` stays in the first-level cache while the panels of b pass
  for (int64_t m = 0; m < M; m += kStrip) {
    for (int64_t j = 0; j < N; j += 2 * kPanel) {
      const int64_t first = std::min(kPanel, N - j), second = std::min(kPanel, N - j - first);
      const Unit<T>* b0 = b[j / kPanel];
      multiply<T>(unit, std::min(kStrip, M - m), a.from(m), packed_units<T>(count), b0,
                  second > 0 ? b[j / kPanel + 1] : b0, b.stride, ahead, [=](int64_t i, f32x16 p, f32x16 q) {
                    T* to = out + (m + i) * N + j;
                    put_through(to, p, first, through), put_through(to + kPanel, q, second, through);
                  });
    }
  }
}

// Everything for an expert whose rows are one task.
template <class T>
void backward_whole(const Layer<T>& layer, const Gradients<T>& grads, const Task& task, Ahead& ahead,
                    const MatrixUnit& unit) {
  const int64_t count = task.end - task.begin, dim = layer.dim, width = layer.width;
  T* grad_gate_up = grads.gate_up + task.expert * dim * 2 * width;
  T* grad_down = grads.down + task.expert * width * dim;
  if (count == 0) {
    std::memset(static_cast<void*>(grad_gate_up), 0, static_cast<size_t>(2 * layer.weight_bytes()));
    std::memset(static_cast<void*>(grad_down), 0, static_cast<size_t>(layer.weight_bytes()));
    return;
  }
  Rows<T> dy_rows = layer.of_tokens(grads.grad_y, task.begin), x_rows = layer.of_tokens(layer.x, task.begin);
  Left<T> dy = pack_left(dy_rows, count, dim, scratch<Unit<T>, 0>(left_size<T>(count, dim)));
  const int64_t grad_stride = spread(2 * width), active_stride = spread(width);
  Halfway<T> half{scratch<T, 4>(count * grad_stride), scratch<T, 5>(count * active_stride), grad_stride, active_stride};
  backward_activation(layer, grads, task, ahead, unit, dy, half);
  Rows<T> dy_packed{reinterpret_cast<const T*>(dy.data), dy.row * kPerUnit<T>};
  small_gradient(unit, ahead, Rows<T>{half.active, active_stride}, width, dy_packed, dim, count, layer.through(),
                 grad_down);
  backward_input(layer, grads, task, ahead, unit, half);
  small_gradient(unit, ahead, x_rows, dim, Rows<T>{half.grad_hidden, grad_stride}, 2 * width, count, layer.through(),
                 grad_gate_up);
}

// grad_hidden and active of split experts, in the tensor `work`.
template <class T>
Halfway<T> in_work(const Layer<T>& layer, const Gradients<T>& grads, int64_t first) {
  const int64_t grad_stride = spread(2 * layer.width), active_stride = spread(layer.width);
  T* active = grads.work + layer.rows * grad_stride;
  return {grads.work + first * grad_stride, active + first * active_stride, grad_stride, active_stride};
}

// Everything but the weights' gradients, for some rows of an expert that is split.
template <class T>
void backward_rows(const Layer<T>& layer, const Gradients<T>& grads, const Task& task, Ahead& ahead,
                   const MatrixUnit& unit) {
  const int64_t count = task.end - task.begin;
  Left<T> dy = pack_left(layer.of_tokens(grads.grad_y, task.begin), count, layer.dim,
                         scratch<Unit<T>, 0>(left_size<T>(count, layer.dim)));
  Halfway<T> half = in_work(layer, grads, task.begin);
  backward_activation(layer, grads, task, ahead, unit, dy, half);
  backward_input(layer, grads, task, ahead, unit, half);
}

// A layer's rows, or some of them, behind backward_rows.
template <class T>
struct Part {
  Layer<T> layer;
  Gradients<T> grads;
};

// The weights' gradients of some experts: blocks of them, each over all of the expert's rows in all parts.
template <class T>
void weight_gradients(const std::vector<Part<T>>& parts, const std::vector<int64_t>& experts, int64_t dim,
                      int64_t width, T* grad_gate_up, T* grad_down) {
  struct Block {
    int64_t expert, m, n;
    bool down;
  };
  std::vector<Block> blocks;
  auto cut = [&](int64_t side) {  // all of them into blocks of at most side x side
    blocks.clear();
    for (int64_t expert : experts) {
      for (int64_t m = 0; m < dim; m += side) {
        for (int64_t n = 0; n < 2 * width; n += side) blocks.push_back({expert, m, n, false});
      }
      for (int64_t m = 0; m < width; m += side) {
        for (int64_t n = 0; n < dim; n += side) blocks.push_back({expert, m, n, true});
      }
    }
  };
  // The matrix unit computes fast enough for packing to count; small blocks share out evenly.
  int64_t side = std::is_same_v<T, float> && has_matrix_unit() ? 512 : 256;
  cut(side);
  if (static_cast<int64_t>(blocks.size()) < 8 * num_threads()) cut(side = 256);
  parallel_for(static_cast<int64_t>(blocks.size()), [&](int64_t i, int) {
    MatrixUnit unit;
    Ahead none;
    const Block& block = blocks[static_cast<size_t>(i)];
    const int64_t M = block.down ? width : dim, N = block.down ? dim : 2 * width;
    const int64_t rows = std::min(side, M - block.m), columns = std::min(side, N - block.n);
    std::vector<Term<T>> terms;
    for (const auto& [layer, grads] : parts) {
      const int64_t first = layer.begin(block.expert), count = layer.end(block.expert) - first;
      Halfway<T> half = in_work(layer, grads, first);
      Rows<T> a = block.down ? Rows<T>{half.active, half.active_stride} : layer.of_tokens(layer.x, first);
      Rows<T> b = block.down ? layer.of_tokens(grads.grad_y, first) : Rows<T>{half.grad_hidden, half.grad_stride};
      terms.push_back({a.column(block.m), b.column(block.n), count});
    }
    T* out = (block.down ? grad_down : grad_gate_up) + block.expert * M * N + block.m * N + block.n;
    if (thread_gemm(unit, Form::TN, rows, columns, terms, out, N, false, none)) return;
    gemm_block(unit, Form::TN, terms, 0, rows, 0, columns, out, N);
  });
}

// Without gradients of the weights (null) they are left to weight_gradients, with `work`.
template <class T>
void backward(const Layer<T>& layer, const Gradients<T>& grads) {
  const bool rows_alone = grads.gate_up == nullptr;
  const std::vector<Task> tasks = split(layer);
  run_tasks(layer, tasks, true, [&](const Task& task, Ahead& ahead, const MatrixUnit& unit) {
    if (task.whole && !rows_alone) backward_whole(layer, grads, task, ahead, unit);
    else if (task.begin < task.end) backward_rows(layer, grads, task, ahead, unit);
  });
  if (rows_alone) return;
  std::vector<int64_t> of_several;
  for (const Task& task : tasks) {
    if (!task.whole && task.begin == layer.begin(task.expert)) of_several.push_back(task.expert);
  }
  weight_gradients<T>({{layer, grads}}, of_several, layer.dim, layer.width, grads.gate_up, grads.down);
}

// ------------------------------------------------------------------------------------------------------ launchers

template <class T>
void moe_forward(const T* x, const float* weights, const int32_t* order, const int32_t* offsets, const T* gate_up,
                 const T* down, int64_t tokens, int64_t top_k, int64_t dim, int64_t experts, int64_t width, T* y,
                 T* hidden, T* rows) {
  Places places(order, offsets, experts, tokens, top_k);
  forward(Layer<T>{x, gate_up, down, weights, order, offsets, places.token.data(), places.rows, dim, experts, width},
          hidden, rows);
  combine(places.slot.data(), weights, rows, tokens, top_k, dim, y);
}

template <class T>
void moe_backward(const T* x, const float* weights, const int32_t* order, const int32_t* offsets, const T* gate_up,
                  const T* down, const T* hidden, const T* grad_y, int64_t tokens, int64_t top_k, int64_t dim,
                  int64_t experts, int64_t width, T* grad_x, float* grad_weights, T* grad_gate_up, T* grad_down,
                  T* rows, T* work) {
  Places places(order, offsets, experts, tokens, top_k);
  for (int64_t a = 0; a < tokens * top_k; ++a) {
    if (places.slot[static_cast<size_t>(a)] < 0) grad_weights[a] = 0.0f;
  }
  Layer<T> layer{x,    gate_up, down,    weights, order, offsets, places.token.data(), places.rows,
                 dim, experts, width};
  backward(layer, Gradients<T>{hidden, grad_y, rows, grad_weights, grad_gate_up, grad_down, work});
  combine<T>(places.slot.data(), nullptr, rows, tokens, top_k, dim, grad_x);
}

template <class T>
void moe_backward_weights(const T* const* x, const T* const* grad_y, const T* const* work, const int32_t* const* order,
                          const int32_t* const* offsets, const int64_t* tokens, int64_t parts, int64_t top_k,
                          int64_t dim, int64_t experts, int64_t width, T* grad_gate_up, T* grad_down) {
  std::vector<Places> places;
  std::vector<Part<T>> all;
  for (int64_t p = 0; p < parts; ++p) places.emplace_back(order[p], offsets[p], experts, tokens[p], top_k);
  for (int64_t p = 0; p < parts; ++p) {
    const Places& there = places[static_cast<size_t>(p)];
    Layer<T> layer{x[p], nullptr, nullptr, nullptr, order[p], offsets[p], there.token.data(), there.rows,
                   dim,  experts, width};
    Gradients<T> grads{nullptr, grad_y[p], nullptr, nullptr, nullptr, nullptr, const_cast<T*>(work[p])};  // reads it
    all.push_back({layer, grads});
  }
  std::vector<int64_t> every(static_cast<size_t>(experts));
  for (int64_t e = 0; e < experts; ++e) every[static_cast<size_t>(e)] = e;
  weight_gradients(all, every, dim, width, grad_gate_up, grad_down);
}

template <class T>
Layer<T> dense_layer(const T* x, const T* gate_up, const T* down, int64_t rows, int64_t dim, int64_t width) {
  return {x, gate_up, down, nullptr, nullptr, nullptr, nullptr, rows, dim, 1, width};
}

}  // namespace
}  // namespace ernie5

extern "C" {

#define ERNIE5_DEFINE_MOE_FFN(SUFFIX, T)                                                                               \
  void ernie5_moe_ffn_forward_cpu_##SUFFIX(const T* x, const float* weights, const int32_t* order,                     \
                                           const int32_t* offsets, const T* gate_up, const T* down, int64_t tokens,    \
                                           int64_t top_k, int64_t dim, int64_t experts, int64_t width, T* y,           \
                                           T* hidden, T* rows) {                                                       \
    ernie5::moe_forward<T>(x, weights, order, offsets, gate_up, down, tokens, top_k, dim, experts, width, y, hidden,   \
                           rows);                                                                                      \
  }                                                                                                                    \
  void ernie5_moe_ffn_backward_cpu_##SUFFIX(                                                                           \
      const T* x, const float* weights, const int32_t* order, const int32_t* offsets, const T* gate_up, const T* down, \
      const T* hidden, const T* grad_y, int64_t tokens, int64_t top_k, int64_t dim, int64_t experts, int64_t width,    \
      T* grad_x, float* grad_weights, T* grad_gate_up, T* grad_down, T* rows, T* work) {                               \
    ernie5::moe_backward<T>(x, weights, order, offsets, gate_up, down, hidden, grad_y, tokens, top_k, dim, experts,    \
                            width, grad_x, grad_weights, grad_gate_up, grad_down, rows, work);                         \
  }                                                                                                                    \
  void ernie5_moe_ffn_backward_weights_cpu_##SUFFIX(                                                                   \
      const T* const* x, const T* const* grad_y, const T* const* work, const int32_t* const* order,                    \
      const int32_t* const* offsets, const int64_t* tokens, int64_t parts, int64_t top_k, int64_t dim,                 \
      int64_t experts, int64_t width, T* grad_gate_up, T* grad_down) {                                                 \
    ernie5::moe_backward_weights<T>(x, grad_y, work, order, offsets, tokens, parts, top_k, dim, experts, width,        \
                                    grad_gate_up, grad_down);                                                          \
  }                                                                                                                    \
  void ernie5_dense_ffn_forward_cpu_##SUFFIX(const T* x, const T* gate_up, const T* down, int64_t rows, int64_t dim,   \
                                             int64_t width, T* y, T* hidden) {                                         \
    ernie5::forward(ernie5::dense_layer(x, gate_up, down, rows, dim, width), hidden, y);                               \
  }                                                                                                                    \
  void ernie5_dense_ffn_backward_cpu_##SUFFIX(const T* x, const T* gate_up, const T* down, const T* hidden,            \
                                              const T* grad_y, int64_t rows, int64_t dim, int64_t width, T* grad_x,    \
                                              T* grad_gate_up, T* grad_down, T* work) {                                \
    ernie5::backward(ernie5::dense_layer(x, gate_up, down, rows, dim, width),                                          \
                     ernie5::Gradients<T>{hidden, grad_y, grad_x, nullptr, grad_gate_up, grad_down, work});            \
  }

ERNIE5_DEFINE_MOE_FFN(f32, float)
ERNIE5_DEFINE_MOE_FFN(bf16, ernie5::bf16)
#undef ERNIE5_DEFINE_MOE_FFN
}
