#include "moe_ffn/moe_ffn_cuda.h"

#include <algorithm>
#include <type_traits>
#include <vector>

#include "common/cuda.h"
#include "common/cuda_blas.h"

namespace ernie5 {
namespace cuda {
namespace {

constexpr int64_t kRowThreads = 256;   // of a block that moves (a part of) one row
constexpr int kActivationWarps = 8;    // rows of a block of the activation, a warp each
constexpr int kMostProducts = 4;       // grouped products of one pass
constexpr int kPointerThreads = 1024;  // scan_block wants them

template <class T>
constexpr Element kElement = std::is_same<T, float>::value ? Element::kFloat : Element::kBfloat16;

// ------------------------------------------------------- moving rows

// slot[assignment] = its row; the others keep what they were set to, -1.
__global__ void __launch_bounds__(kRowThreads) place_rows(const int32_t* order, int64_t rows, int32_t* slot) {
  int64_t row = blockIdx.x * kRowThreads + threadIdx.x;
  if (row < rows) slot[order[row]] = static_cast<int32_t>(row);
}

// rows[r] = x[order[r] / top_k]; a thread a pack.
template <class T, int V>
__global__ void __launch_bounds__(kRowThreads)
    permute_rows(const T* x, const int32_t* order, int top_k, int64_t dim, T* rows) {
  int64_t i = (blockIdx.y * static_cast<int64_t>(blockDim.x) + threadIdx.x) * V;
  if (i >= dim) return;
  int64_t token = order[blockIdx.x] / top_k;
  using Bits = Pack<T, V>;
  *reinterpret_cast<Bits*>(rows + blockIdx.x * dim + i) = *reinterpret_cast<const Bits*>(x + token * dim + i);
}

// y[t] = sum over k of weights[t, k] * rows[slot[t, k]], in order of k; weights null: all one. A gather: no two threads
// add to one element.
template <class T, int V>
__global__ void __launch_bounds__(kRowThreads)
    combine_rows(const T* rows, const int32_t* slot, const float* weights, int top_k, int64_t dim, T* y) {
  int64_t i = (blockIdx.y * static_cast<int64_t>(blockDim.x) + threadIdx.x) * V;
  if (i >= dim) return;
  const int64_t first = blockIdx.x * static_cast<int64_t>(top_k);
  float total[V] = {};
#pragma unroll 4
  for (int k = 0; k < top_k; ++k) {
    const int64_t row = slot[first + k];
    if (row < 0) continue;
    const float weight = weights != nullptr ? weights[first + k] : 1.0f;
    float v[V];
    load(v, rows + row * dim + i);
#pragma unroll
    for (int j = 0; j < V; ++j) total[j] += weight * v[j];
  }
  store(y + blockIdx.x * dim + i, total);
}

// ------------------------------------------------------- SwiGLU: a warp a row

__device__ inline float sigmoid(float v) { return 1.0f / (1.0f + __expf(-v)); }

// active [rows, F] = silu(gate) * up of hidden [rows, 2F]
template <class T, int V>
__global__ void __launch_bounds__(kActivationWarps* kWarp)
    activate(const T* hidden, int64_t rows, int64_t width, T* active) {
  const int64_t row = blockIdx.x * int64_t{kActivationWarps} + warp_id();
  if (row >= rows) return;
  const T* both = hidden + row * 2 * width;
  for (int64_t i = lane_id() * V; i < width; i += kWarp * V) {
    float gate[V], up[V];
    load(gate, both + i);
    load(up, both + width + i);
#pragma unroll
    for (int j = 0; j < V; ++j) gate[j] *= sigmoid(gate[j]) * up[j];
    store(active + row * width + i, gate);
  }
}

// The gradient grad [rows, F] of the activation (before the combine weight) becomes weight * activation in place, which
// the gradient of `down` needs; grad_hidden [rows, 2F] and grad_weights[order[row]] are written. weights null: all one.
template <class T, int V>
__global__ void __launch_bounds__(kActivationWarps* kWarp)
    activate_backward(const T* hidden, const float* weights, const int32_t* order, int64_t rows, int64_t width, T* grad,
                      T* grad_hidden, float* grad_weights) {
  const int64_t row = blockIdx.x * int64_t{kActivationWarps} + warp_id();
  if (row >= rows) return;
  const T* both = hidden + row * 2 * width;
  T* grad_both = grad_hidden + row * 2 * width;
  const int64_t assignment = weights != nullptr ? order[row] : 0;
  const float weight = weights != nullptr ? weights[assignment] : 1.0f;
  float dot = 0.0f;
  for (int64_t i = lane_id() * V; i < width; i += kWarp * V) {
    float gate[V], up[V], g[V];
    load(gate, both + i);
    load(up, both + width + i);
    load(g, grad + row * width + i);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const float s = sigmoid(gate[j]), silu = gate[j] * s, active = silu * up[j];
      const float weighted = g[j] * weight;
      dot += g[j] * active;
      g[j] = active * weight;
      gate[j] = weighted * up[j] * (s + silu * (1.0f - s));
      up[j] = weighted * silu;
    }
    store(grad + row * width + i, g);
    store(grad_both + i, gate);
    store(grad_both + width + i, up);
  }
  if (weights == nullptr) return;
  dot = across_warp(dot, Add());
  if (lane_id() == 0) grad_weights[assignment] = dot;
}

template <class T>
int run_permute(const T* x, const int32_t* order, int64_t rows, int64_t top_k, int64_t dim, T* to,
                cudaStream_t stream) {
  if (rows == 0 || dim == 0) return 0;
  const bool wide = rows_aligned<T>(dim, x, to);
  const int64_t packs = wide ? dim / kWide<T> : dim;
  const unsigned threads = threads_for(packs, kRowThreads);
  dim3 grid(static_cast<unsigned>(rows), static_cast<unsigned>(ceil_div(packs, threads)));
  auto kernel = wide ? permute_rows<T, kWide<T>> : permute_rows<T, 1>;
  kernel<<<grid, threads, 0, stream>>>(x, order, static_cast<int>(top_k), dim, to);
  return launched();
}

template <class T>
int run_combine(const T* rows, const int32_t* slot, const float* weights, int64_t tokens, int64_t top_k, int64_t dim,
                T* y, cudaStream_t stream) {
  if (tokens == 0 || dim == 0) return 0;
  const bool wide = rows_aligned<T>(dim, rows, y);
  const int64_t packs = wide ? dim / kWide<T> : dim;
  const unsigned threads = threads_for(packs, kRowThreads);
  dim3 grid(static_cast<unsigned>(tokens), static_cast<unsigned>(ceil_div(packs, threads)));
  auto kernel = wide ? combine_rows<T, kWide<T>> : combine_rows<T, 1>;
  kernel<<<grid, threads, 0, stream>>>(rows, slot, weights, static_cast<int>(top_k), dim, y);
  return launched();
}

template <class T>
int run_activate(const T* hidden, int64_t rows, int64_t width, T* active, cudaStream_t stream) {
  if (rows == 0 || width == 0) return 0;
  auto kernel = rows_aligned<T>(width, hidden, active) ? activate<T, kWide<T>> : activate<T, 1>;
  kernel<<<static_cast<unsigned>(ceil_div(rows, kActivationWarps)), kActivationWarps * kWarp, 0, stream>>>(
      hidden, rows, width, active);
  return launched();
}

template <class T>
int run_activate_backward(const T* hidden, const float* weights, const int32_t* order, int64_t rows, int64_t width,
                          T* grad, T* grad_hidden, float* grad_weights, cudaStream_t stream) {
  if (rows == 0) return 0;  // with a width of 0 the weights' gradients are still written
  const bool wide = rows_aligned<T>(width, hidden, grad, grad_hidden);
  auto kernel = wide ? activate_backward<T, kWide<T>> : activate_backward<T, 1>;
  kernel<<<static_cast<unsigned>(ceil_div(rows, kActivationWarps)), kActivationWarps * kWarp, 0, stream>>>(
      hidden, weights, order, rows, width, grad, grad_hidden, grad_weights);
  return launched();
}

// ------------------------------------------------------- one product an expert

// Where an operand of expert e begins: base + offsets[e] * of_row + e * of_expert bytes.
struct Operand {
  char* base;
  int64_t of_row, of_expert;
  __host__ __device__ void* begin(int64_t row, int64_t expert) const {
    return base + row * of_row + expert * of_expert;
  }
};

enum class Varies { kM, kK };  // which side of the product is an expert's number of rows

struct GroupedProduct {
  Product shape;
  Varies varies;
  Operand a, b, c;
};

struct GroupedProducts {
  int count = 0;
  GroupedProduct of[kMostProducts];
};

// The products' pointers [count, 3, E] of the experts that have rows, side by side in order of expert.
__global__ void __launch_bounds__(kPointerThreads)
    find_operands(const __grid_constant__ GroupedProducts products, const int32_t* offsets, int experts,
                  void** pointers) {
  __shared__ int sums[kWarp];
  int before = 0;
  for (int first = 0; first < experts; first += kPointerThreads) {
    const int e = first + static_cast<int>(threadIdx.x);
    const int64_t row = e < experts ? offsets[e] : 0;
    const bool active = e < experts && offsets[e + 1] > row;
    int all = 0;
    const int place = before + scan_block(active ? 1 : 0, sums, all) - 1;
    before += all;
    if (!active) continue;
    for (int p = 0; p < products.count; ++p) {
      const GroupedProduct& product = products.of[p];
      void** to = pointers + p * int64_t{3} * experts + place;
      to[0] = product.a.begin(row, e);
      to[experts] = product.b.begin(row, e);
      to[int64_t{2} * experts] = product.c.begin(row, e);
    }
  }
}

// The grouped products of one pass; each runs when asked for.
class Experts {
 public:
  Experts(const Blas& blas, Element type, const int32_t* host_offsets, int64_t experts, cudaStream_t stream)
      : blas_(blas), type_(type), offsets_(host_offsets), experts_(experts), stream_(stream) {}

  int begin(const GroupedProducts& products, const int32_t* offsets, void** pointers) {
    products_ = products;
    pointers_ = pointers;
    one_call_ = blas_.has_grouped() && sides_aligned();
    if (!one_call_ || experts_ == 0) return 0;
    find_operands<<<1, kPointerThreads, 0, stream_>>>(products_, offsets, static_cast<int>(experts_), pointers_);
    return launched();
  }

  int multiply(int number) const {
    const GroupedProduct& product = products_.of[number];
    if (one_call_) {
      static thread_local std::vector<Product> shapes;
      shapes.clear();
      for (int64_t e = 0; e < experts_; ++e) {
        if (rows(e) > 0) shapes.push_back(shape_of(product, e));
      }
      void** p = pointers_ + number * 3 * experts_;
      int code = blas_.grouped(type_, static_cast<int>(shapes.size()), shapes.data(), p, p + experts_,
                               p + 2 * experts_);
      if (code != kBlasFailed + kBlasNotSupported) return code;
    }
    for (int64_t e = 0; e < experts_; ++e) {
      if (rows(e) == 0) continue;
      int64_t row = offsets_[e];
      int code = blas_.gemm(type_, shape_of(product, e), product.a.begin(row, e), product.b.begin(row, e), 0.0f,
                            product.c.begin(row, e));
      if (code != 0) return code;
    }
    return 0;
  }

  // Zero for the matrices, `bytes_each` long from `base` on, of experts without rows; neighbours together.
  int clear_unused(char* base, int64_t bytes_each) const {
    for (int64_t e = 0; e < experts_;) {
      int64_t from = e;
      while (e < experts_ && rows(e) == 0) ++e;
      if (e > from && bytes_each > 0) {
        auto code = cudaMemsetAsync(base + from * bytes_each, 0, static_cast<size_t>((e - from) * bytes_each), stream_);
        if (code != cudaSuccess) return static_cast<int>(code);
      }
      if (e < experts_) ++e;
    }
    return 0;
  }

 private:
  int64_t rows(int64_t expert) const { return offsets_[expert + 1] - offsets_[expert]; }

  Product shape_of(const GroupedProduct& product, int64_t expert) const {
    Product shape = product.shape;
    (product.varies == Varies::kM ? shape.m : shape.k) = rows(expert);
    return shape;
  }

  // cuBLAS's grouped products want matrices that begin on 16 bytes, and no empty side.
  bool sides_aligned() const {
    bool good = true;
    for (int p = 0; p < products_.count; ++p) {
      const GroupedProduct& product = products_.of[p];
      for (const Operand* o : {&product.a, &product.b, &product.c}) {
        good = good && aligned(16, o->base) && o->of_row % 16 == 0 && o->of_expert % 16 == 0;
      }
      const Product& shape = product.shape;
      good = good && shape.n > 0 && (product.varies == Varies::kM ? shape.k : shape.m) > 0;
    }
    return good;
  }

  const Blas& blas_;
  Element type_;
  const int32_t* offsets_;
  int64_t experts_;
  cudaStream_t stream_;
  GroupedProducts products_;
  void** pointers_ = nullptr;
  bool one_call_ = false;
};

// ------------------------------------------------------- the layer

// Cuts a workspace into aligned pieces; a null start only adds up their sizes.
class Pieces {
 public:
  explicit Pieces(void* start) : start_(static_cast<char*>(start)) {}
  template <class T>
  T* take(int64_t count) {
    char* piece = start_ != nullptr ? start_ + used_ : nullptr;
    used_ += round_up(count * static_cast<int64_t>(sizeof(T)), 256);
    return reinterpret_cast<T*>(piece);
  }
  int64_t used() const { return used_; }

 private:
  char* start_;
  int64_t used_ = 0;
};

struct Sizes {
  int64_t tokens, top_k, dim, experts, width;
  int64_t assignments() const { return tokens * top_k; }
};

template <class T>
struct ForwardSpace {
  char* blas;
  int32_t* slot;
  void** pointers;
  T *active, *hidden;
  int64_t bytes;

  ForwardSpace(void* workspace, const Sizes& s, bool keep) {
    Pieces pieces(workspace);
    blas = pieces.take<char>(kBlasWorkspace);
    slot = pieces.take<int32_t>(s.assignments());
    pointers = pieces.take<void*>(2 * 3 * s.experts);
    active = pieces.take<T>(s.assignments() * s.width);
    hidden = pieces.take<T>(keep ? 0 : s.assignments() * 2 * s.width);
    bytes = pieces.used();
  }
};

template <class T>
struct BackwardSpace {
  char* blas;
  int32_t* slot;
  void** pointers;
  T* x;
  int64_t bytes;

  BackwardSpace(void* workspace, const Sizes& s) {
    Pieces pieces(workspace);
    blas = pieces.take<char>(kBlasWorkspace);
    slot = pieces.take<int32_t>(s.assignments());
    pointers = pieces.take<void*>(4 * 3 * s.experts);
    x = pieces.take<T>(s.assignments() * s.dim);
    bytes = pieces.used();
  }
};

// An operand whose rows follow the assignments, and one with a matrix an expert.
template <class T>
Operand by_row(const T* base, int64_t columns) {
  return {reinterpret_cast<char*>(const_cast<T*>(base)), columns * static_cast<int64_t>(sizeof(T)), 0};
}
template <class T>
Operand by_expert(const T* base, int64_t elements) {
  return {reinterpret_cast<char*>(const_cast<T*>(base)), 0, elements * static_cast<int64_t>(sizeof(T))};
}

// Host offsets rise from 0 and stay within the assignments: what follows trusts them with memory.
bool sound(const Sizes& s, const int32_t* host_offsets) {
  bool good = s.top_k > 0 && fits_grid(s.assignments()) && fits_grid(s.experts) && host_offsets[0] == 0;
  for (int64_t e = 0; e < s.experts; ++e) good = good && host_offsets[e] <= host_offsets[e + 1];
  return good && host_offsets[s.experts] <= s.assignments();
}

int fill_slots(const int32_t* order, int64_t rows, int64_t assignments, int32_t* slot, cudaStream_t stream) {
  if (assignments == 0) return 0;
  cudaError_t error = cudaMemsetAsync(slot, 0xff, static_cast<size_t>(assignments) * sizeof(int32_t), stream);
  if (error != cudaSuccess) return static_cast<int>(error);
  if (rows == 0) return 0;
  place_rows<<<static_cast<unsigned>(ceil_div(rows, kRowThreads)), kRowThreads, 0, stream>>>(order, rows, slot);
  return launched();
}

// The first code that is not 0 of calls made in order; later ones are not made.
template <class... Calls>
int in_order(Calls&&... calls) {
  int code = 0;
  ((code == 0 ? code = calls() : 0), ...);
  return code;
}

template <class T>
int run_forward(const T* x, const float* weights, const int32_t* order, const int32_t* offsets, const T* gate_up,
                const T* down, Sizes s, T* y, T* hidden, T* rows, const int32_t* host_offsets, void* workspace,
                void* stream_pointer) {
  if (!sound(s, host_offsets)) return static_cast<int>(cudaErrorInvalidValue);
  cudaStream_t stream = as_stream(stream_pointer);
  ForwardSpace<T> space(workspace, s, hidden != nullptr);
  if (hidden == nullptr) hidden = space.hidden;
  const int64_t count = host_offsets[s.experts];
  // `rows` holds the permuted x until the first product has read it, then what the experts give.
  GroupedProducts products;
  products.of[products.count++] = {{false, false, 0, 2 * s.width, s.dim}, Varies::kM, by_row(rows, s.dim),
                                   by_expert(gate_up, s.dim * 2 * s.width), by_row(hidden, 2 * s.width)};
  products.of[products.count++] = {{false, false, 0, s.dim, s.width}, Varies::kM, by_row(space.active, s.width),
                                   by_expert(down, s.width * s.dim), by_row(rows, s.dim)};
  Blas blas;
  Experts experts(blas, kElement<T>, host_offsets, s.experts, stream);
  return in_order([&] { return blas.open(stream, space.blas); },
                  [&] { return fill_slots(order, count, s.assignments(), space.slot, stream); },
                  [&] { return experts.begin(products, offsets, space.pointers); },
                  [&] { return run_permute(x, order, count, s.top_k, s.dim, rows, stream); },
                  [&] { return experts.multiply(0); },
                  [&] { return run_activate(hidden, count, s.width, space.active, stream); },
                  [&] { return experts.multiply(1); },
                  [&] { return run_combine(rows, space.slot, weights, s.tokens, s.top_k, s.dim, y, stream); });
}

template <class T>
int run_backward(const T* x, const float* weights, const int32_t* order, const int32_t* offsets, const T* gate_up,
                 const T* down, const T* hidden, const T* grad_y, Sizes s, T* grad_x, float* grad_weights,
                 T* grad_gate_up, T* grad_down, T* rows, T* work, const int32_t* host_offsets, void* workspace,
                 void* stream_pointer) {
  if (!sound(s, host_offsets)) return static_cast<int>(cudaErrorInvalidValue);
  cudaStream_t stream = as_stream(stream_pointer);
  BackwardSpace<T> space(workspace, s);
  const int64_t count = host_offsets[s.experts], matrix = s.dim * s.width;
  // Two results share memory with what made them: `rows` holds the permuted grad_y, then the gradient of the permuted
  // x; `active` the gradient of the activation, then the weighted activation.
  T *grad_hidden = work, *active = work + s.assignments() * 2 * s.width;
  GroupedProducts products;
  products.of[products.count++] = {{false, true, 0, s.width, s.dim}, Varies::kM, by_row(rows, s.dim),
                                   by_expert(down, matrix), by_row(active, s.width)};
  products.of[products.count++] = {{true, false, s.width, s.dim, 0}, Varies::kK, by_row(active, s.width),
                                   by_row(rows, s.dim), by_expert(grad_down, matrix)};
  products.of[products.count++] = {{false, true, 0, s.dim, 2 * s.width}, Varies::kM, by_row(grad_hidden, 2 * s.width),
                                   by_expert(gate_up, 2 * matrix), by_row(rows, s.dim)};
  products.of[products.count++] = {{true, false, s.dim, 2 * s.width, 0}, Varies::kK, by_row(space.x, s.dim),
                                   by_row(grad_hidden, 2 * s.width), by_expert(grad_gate_up, 2 * matrix)};
  auto clear_weights = [&] {
    auto bytes = static_cast<size_t>(s.assignments()) * sizeof(float);
    return bytes == 0 ? 0 : static_cast<int>(cudaMemsetAsync(grad_weights, 0, bytes, stream));
  };
  Blas blas;
  Experts experts(blas, kElement<T>, host_offsets, s.experts, stream);
  constexpr auto kSize = static_cast<int64_t>(sizeof(T));
  return in_order(
      [&] { return blas.open(stream, space.blas); }, clear_weights,
      [&] { return fill_slots(order, count, s.assignments(), space.slot, stream); },
      [&] { return experts.clear_unused(reinterpret_cast<char*>(grad_gate_up), 2 * matrix * kSize); },
      [&] { return experts.clear_unused(reinterpret_cast<char*>(grad_down), matrix * kSize); },
      [&] { return experts.begin(products, offsets, space.pointers); },
      [&] { return run_permute(grad_y, order, count, s.top_k, s.dim, rows, stream); },
      [&] { return run_permute(x, order, count, s.top_k, s.dim, space.x, stream); },
      [&] { return experts.multiply(0); },
      [&] {
        return run_activate_backward(hidden, weights, order, count, s.width, active, grad_hidden, grad_weights, stream);
      },
      [&] { return experts.multiply(1); }, [&] { return experts.multiply(2); }, [&] { return experts.multiply(3); },
      [&] {
        return run_combine(rows, space.slot, static_cast<const float*>(nullptr), s.tokens, s.top_k, s.dim, grad_x,
                           stream);
      });
}

// ------------------------------------------------------- one dense expert

template <class T>
struct DenseSpace {
  char* blas;
  T *active, *hidden;
  int64_t bytes;

  DenseSpace(void* workspace, int64_t rows, int64_t width, bool keep) {
    Pieces pieces(workspace);
    blas = pieces.take<char>(kBlasWorkspace);
    active = pieces.take<T>(rows * width);
    hidden = pieces.take<T>(keep ? 0 : rows * 2 * width);
    bytes = pieces.used();
  }
};

template <class T>
int run_dense_forward(const T* x, const T* gate_up, const T* down, int64_t rows, int64_t dim, int64_t width, T* y,
                      T* hidden, void* workspace, void* stream_pointer) {
  if (!fits_grid(rows)) return static_cast<int>(cudaErrorInvalidValue);
  cudaStream_t stream = as_stream(stream_pointer);
  DenseSpace<T> space(workspace, rows, width, hidden != nullptr);
  if (hidden == nullptr) hidden = space.hidden;
  Blas blas;
  constexpr Element kType = kElement<T>;
  return in_order([&] { return blas.open(stream, space.blas); },
                  [&] { return blas.gemm(kType, {false, false, rows, 2 * width, dim}, x, gate_up, 0.0f, hidden); },
                  [&] { return run_activate(hidden, rows, width, space.active, stream); },
                  [&] { return blas.gemm(kType, {false, false, rows, dim, width}, space.active, down, 0.0f, y); });
}

template <class T>
int run_dense_backward(const T* x, const T* gate_up, const T* down, const T* hidden, const T* grad_y, int64_t rows,
                       int64_t dim, int64_t width, T* grad_x, T* grad_gate_up, T* grad_down, T* work, void* workspace,
                       void* stream_pointer) {
  if (!fits_grid(rows)) return static_cast<int>(cudaErrorInvalidValue);
  cudaStream_t stream = as_stream(stream_pointer);
  T *grad_hidden = work, *active = work + rows * 2 * width;
  Blas blas;
  constexpr Element kType = kElement<T>;
  return in_order(
      [&] { return blas.open(stream, workspace); },
      [&] { return blas.gemm(kType, {false, true, rows, width, dim}, grad_y, down, 0.0f, active); },
      [&] {
        return run_activate_backward(hidden, static_cast<const float*>(nullptr), static_cast<const int32_t*>(nullptr),
                                     rows, width, active, grad_hidden, static_cast<float*>(nullptr), stream);
      },
      [&] { return blas.gemm(kType, {true, false, width, dim, rows}, active, grad_y, 0.0f, grad_down); },
      [&] { return blas.gemm(kType, {false, true, rows, dim, 2 * width}, grad_hidden, gate_up, 0.0f, grad_x); },
      [&] { return blas.gemm(kType, {true, false, dim, 2 * width, rows}, x, grad_hidden, 0.0f, grad_gate_up); });
}

}  // namespace
}  // namespace cuda
}  // namespace ernie5

using namespace ernie5::cuda;

extern "C" {

int ernie5_moe_ffn_host_offsets_cuda(const int32_t* offsets, int64_t experts, int32_t* host_offsets, void* stream) {
  auto bytes = static_cast<size_t>(experts + 1) * sizeof(int32_t);
  cudaError_t error = cudaMemcpyAsync(host_offsets, offsets, bytes, cudaMemcpyDeviceToHost, as_stream(stream));
  if (error == cudaSuccess) error = cudaStreamSynchronize(as_stream(stream));
  return static_cast<int>(error);
}

int64_t ernie5_moe_ffn_forward_cuda_workspace_bytes_f32(int64_t tokens, int64_t top_k, int64_t dim, int64_t experts,
                                                        int64_t width, int keep) {
  return ForwardSpace<float>(nullptr, {tokens, top_k, dim, experts, width}, keep != 0).bytes;
}

int64_t ernie5_moe_ffn_forward_cuda_workspace_bytes_bf16(int64_t tokens, int64_t top_k, int64_t dim, int64_t experts,
                                                         int64_t width, int keep) {
  return ForwardSpace<bf16>(nullptr, {tokens, top_k, dim, experts, width}, keep != 0).bytes;
}

int64_t ernie5_moe_ffn_backward_cuda_workspace_bytes_f32(int64_t tokens, int64_t top_k, int64_t dim, int64_t experts,
                                                         int64_t width) {
  return BackwardSpace<float>(nullptr, {tokens, top_k, dim, experts, width}).bytes;
}

int64_t ernie5_moe_ffn_backward_cuda_workspace_bytes_bf16(int64_t tokens, int64_t top_k, int64_t dim, int64_t experts,
                                                          int64_t width) {
  return BackwardSpace<bf16>(nullptr, {tokens, top_k, dim, experts, width}).bytes;
}

int ernie5_moe_ffn_forward_cuda_f32(const float* x, const float* weights, const int32_t* order, const int32_t* offsets,
                                    const float* gate_up, const float* down, int64_t tokens, int64_t top_k, int64_t dim,
                                    int64_t experts, int64_t width, float* y, float* hidden, float* rows,
                                    const int32_t* host_offsets, void* workspace, void* stream) {
  return run_forward(x, weights, order, offsets, gate_up, down, {tokens, top_k, dim, experts, width}, y, hidden, rows,
                     host_offsets, workspace, stream);
}

int ernie5_moe_ffn_forward_cuda_bf16(const uint16_t* x, const float* weights, const int32_t* order,
                                     const int32_t* offsets, const uint16_t* gate_up, const uint16_t* down,
                                     int64_t tokens, int64_t top_k, int64_t dim, int64_t experts, int64_t width,
                                     uint16_t* y, uint16_t* hidden, uint16_t* rows, const int32_t* host_offsets,
                                     void* workspace, void* stream) {
  return run_forward(typed(x), weights, order, offsets, typed(gate_up), typed(down),
                     {tokens, top_k, dim, experts, width}, typed(y), typed(hidden), typed(rows), host_offsets,
                     workspace, stream);
}

int ernie5_moe_ffn_backward_cuda_f32(const float* x, const float* weights, const int32_t* order, const int32_t* offsets,
                                     const float* gate_up, const float* down, const float* hidden, const float* grad_y,
                                     int64_t tokens, int64_t top_k, int64_t dim, int64_t experts, int64_t width,
                                     float* grad_x, float* grad_weights, float* grad_gate_up, float* grad_down,
                                     float* rows, float* work, const int32_t* host_offsets, void* workspace,
                                     void* stream) {
  return run_backward(x, weights, order, offsets, gate_up, down, hidden, grad_y, {tokens, top_k, dim, experts, width},
                      grad_x, grad_weights, grad_gate_up, grad_down, rows, work, host_offsets, workspace, stream);
}

int ernie5_moe_ffn_backward_cuda_bf16(const uint16_t* x, const float* weights, const int32_t* order,
                                      const int32_t* offsets, const uint16_t* gate_up, const uint16_t* down,
                                      const uint16_t* hidden, const uint16_t* grad_y, int64_t tokens, int64_t top_k,
                                      int64_t dim, int64_t experts, int64_t width, uint16_t* grad_x,
                                      float* grad_weights, uint16_t* grad_gate_up, uint16_t* grad_down, uint16_t* rows,
                                      uint16_t* work, const int32_t* host_offsets, void* workspace, void* stream) {
  return run_backward(typed(x), weights, order, offsets, typed(gate_up), typed(down), typed(hidden), typed(grad_y),
                      {tokens, top_k, dim, experts, width}, typed(grad_x), grad_weights, typed(grad_gate_up),
                      typed(grad_down), typed(rows), typed(work), host_offsets, workspace, stream);
}

int64_t ernie5_dense_ffn_forward_cuda_workspace_bytes_f32(int64_t rows, int64_t width, int keep) {
  return DenseSpace<float>(nullptr, rows, width, keep != 0).bytes;
}

int64_t ernie5_dense_ffn_forward_cuda_workspace_bytes_bf16(int64_t rows, int64_t width, int keep) {
  return DenseSpace<bf16>(nullptr, rows, width, keep != 0).bytes;
}

int64_t ernie5_dense_ffn_backward_cuda_workspace_bytes() { return kBlasWorkspace; }

int ernie5_dense_ffn_forward_cuda_f32(const float* x, const float* gate_up, const float* down, int64_t rows,
                                      int64_t dim, int64_t width, float* y, float* hidden, void* workspace,
                                      void* stream) {
  return run_dense_forward(x, gate_up, down, rows, dim, width, y, hidden, workspace, stream);
}

int ernie5_dense_ffn_forward_cuda_bf16(const uint16_t* x, const uint16_t* gate_up, const uint16_t* down, int64_t rows,
                                       int64_t dim, int64_t width, uint16_t* y, uint16_t* hidden, void* workspace,
                                       void* stream) {
  return run_dense_forward(typed(x), typed(gate_up), typed(down), rows, dim, width, typed(y), typed(hidden), workspace,
                           stream);
}

int ernie5_dense_ffn_backward_cuda_f32(const float* x, const float* gate_up, const float* down, const float* hidden,
                                       const float* grad_y, int64_t rows, int64_t dim, int64_t width, float* grad_x,
                                       float* grad_gate_up, float* grad_down, float* work, void* workspace,
                                       void* stream) {
  return run_dense_backward(x, gate_up, down, hidden, grad_y, rows, dim, width, grad_x, grad_gate_up, grad_down, work,
                            workspace, stream);
}

int ernie5_dense_ffn_backward_cuda_bf16(const uint16_t* x, const uint16_t* gate_up, const uint16_t* down,
                                        const uint16_t* hidden, const uint16_t* grad_y, int64_t rows, int64_t dim,
                                        int64_t width, uint16_t* grad_x, uint16_t* grad_gate_up, uint16_t* grad_down,
                                        uint16_t* work, void* workspace, void* stream) {
  return run_dense_backward(typed(x), typed(gate_up), typed(down), typed(hidden), typed(grad_y), rows, dim, width,
                            typed(grad_x), typed(grad_gate_up), typed(grad_down), typed(work), workspace, stream);
}

}  // extern "C"
