#include "patch_embed/patch_embed_cuda.h"

#include <type_traits>

#include "common/cuda.h"
#include "common/cuda_blas.h"

namespace ernie5 {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kPacksEach = 4;                      // of a thread
constexpr int kMostChannels = 64;
constexpr int64_t kSlabBytes = int64_t{32} << 20;  // patches that the product then finds in the second-level cache
constexpr int64_t kSumRows = 256;                  // tokens of one partial sum of the bias' gradient
constexpr int64_t kMostSums = 128;

struct Sizes {
  int64_t B, T, H, W, C, pt, ph, pw, lead, D;

  int64_t times() const { return T > 0 ? ceil_div(lead + T, pt) : 0; }
  int64_t run() const { return pw * C; }  // neighbouring values of a patch in one row of pixels
  int64_t depth() const { return pt * ph * run(); }
  int64_t across() const { return W / pw; }
  int64_t strips() const { return B * times() * (H / ph); }  // rows of patches
  int64_t tokens() const { return strips() * across(); }
  bool valid() const {
    return pt > 0 && ph > 0 && pw > 0 && H % ph == 0 && W % pw == 0 && C <= kMostChannels && lead >= 0 && lead < pt &&
           fits_grid(across() * depth()) && fits_grid(tokens()) && fits_grid(W * C);
  }
};

// A value v counts as v * scale + shift.
struct Moments {
  float scale[kMostChannels], shift[kMostChannels];
};

template <class Video>
Moments moments(const float* mean, const float* deviation, int64_t channels) {
  const double unit = std::is_same<Video, uint8_t>::value ? 255.0 : 1.0;
  Moments m{};
  for (int64_t c = 0; c < channels; ++c) {
    m.scale[c] = static_cast<float>(1.0 / (unit * deviation[c]));
    m.shift[c] = static_cast<float>(-static_cast<double>(mean[c]) / deviation[c]);
  }
  return m;
}

// A video as the kernels walk over it: strip by strip, a strip being `across` patches side by side.
struct Strips {
  int times, down, frames, height, lead;
  int line;       // values of a row of pixels
  int run, runs;  // values of a run; runs of a patch
  int pt, ph, across, channels;

  explicit Strips(const Sizes& s)
      : times(static_cast<int>(s.times())),
        down(static_cast<int>(s.H / s.ph)),
        frames(static_cast<int>(s.T)),
        height(static_cast<int>(s.H)),
        lead(static_cast<int>(s.lead)),
        line(static_cast<int>(s.W * s.C)),
        run(static_cast<int>(s.run())),
        runs(static_cast<int>(s.pt * s.ph)),
        pt(static_cast<int>(s.pt)),
        ph(static_cast<int>(s.ph)),
        across(static_cast<int>(s.across())),
        channels(static_cast<int>(s.C)) {}

  // Where value `at` of a strip's patches [across, runs, run] lies in the video, or -1 if its frame is missing;
  // `in_run` becomes its place in its run.
  __device__ int64_t find(int strip, int at, int& in_run) const {
    const int row = strip % down, time = strip / down % times, clip = strip / down / times;
    in_run = at % run;
    const int number = at / run, patch = number / runs, of_patch = number % runs;
    const int frame = time * pt + of_patch / ph - lead;
    if (frame < 0 || frame >= frames) return -1;
    const int64_t pixels = (int64_t{clip} * frames + frame) * height + row * ph + of_patch % ph;
    return pixels * line + int64_t{patch} * run + in_run;
  }
};

__device__ inline float widen(uint8_t v) { return static_cast<float>(v); }
using cuda::widen;

// patches [strips, across, K] of strips first, first + 1, ... (blockIdx.x); V divides a run, so a pack lies in one row
// of pixels.
template <class Video, class T, int V>
__global__ void __launch_bounds__(kThreads)
    gather(const Video* video, const __grid_constant__ Strips strips, const __grid_constant__ Moments moments,
           int first, T* patches) {
  __shared__ float scale[kMostChannels], shift[kMostChannels];
  for (int c = static_cast<int>(threadIdx.x); c < strips.channels; c += kThreads) {
    scale[c] = moments.scale[c];
    shift[c] = moments.shift[c];
  }
  __syncthreads();
  const int values = strips.across * strips.runs * strips.run;
  T* to = patches + blockIdx.x * static_cast<int64_t>(values);
#pragma unroll
  for (int p = 0; p < kPacksEach; ++p) {
    const int64_t i = ((blockIdx.y * int64_t{kPacksEach} + p) * kThreads + threadIdx.x) * V;
    if (i >= values) return;
    int in_run;
    const int64_t from = strips.find(first + static_cast<int>(blockIdx.x), static_cast<int>(i), in_run);
    float out[V] = {};
    if (from >= 0) {
      const Pack<Video, V> pack = *reinterpret_cast<const Pack<Video, V>*>(video + from);
      int channel = in_run % strips.channels;
#pragma unroll
      for (int j = 0; j < V; ++j) {
        out[j] = widen(pack.at[j]) * scale[channel] + shift[channel];
        if (++channel == strips.channels) channel = 0;
      }
    }
    store(to + i, out);
  }
}

// The way back: video_grad = gradient of the patches * scale. Every value of the video is in one patch.
template <class T, int V>
__global__ void __launch_bounds__(kThreads)
    scatter(const T* patches_grad, const __grid_constant__ Strips strips, const __grid_constant__ Moments moments,
            float* video_grad) {
  __shared__ float scale[kMostChannels];
  for (int c = static_cast<int>(threadIdx.x); c < strips.channels; c += kThreads) scale[c] = moments.scale[c];
  __syncthreads();
  const int values = strips.across * strips.runs * strips.run;
#pragma unroll
  for (int p = 0; p < kPacksEach; ++p) {
    const int64_t i = ((blockIdx.y * int64_t{kPacksEach} + p) * kThreads + threadIdx.x) * V;
    if (i >= values) return;
    int in_run;
    const int64_t to = strips.find(static_cast<int>(blockIdx.x), static_cast<int>(i), in_run);
    if (to < 0) continue;
    float grad[V];
    load(grad, patches_grad + blockIdx.x * static_cast<int64_t>(values) + i);
    int channel = in_run % strips.channels;
#pragma unroll
    for (int j = 0; j < V; ++j) {
      grad[j] *= scale[channel];
      if (++channel == strips.channels) channel = 0;
    }
    store(video_grad + to, grad);
  }
}

// Every row of tokens becomes the bias; the product adds to it.
template <class T, int V>
__global__ void __launch_bounds__(kThreads) fill_bias(const T* bias, int64_t columns, T* tokens) {
  using Bits = Pack<T, V>;
  for (int64_t i = threadIdx.x * V; i < columns; i += blockDim.x * V) {
    *reinterpret_cast<Bits*>(tokens + blockIdx.x * columns + i) = *reinterpret_cast<const Bits*>(bias + i);
  }
}

// ------------------------------------------------------- launches

template <class T>
constexpr Element kElement = std::is_same<T, float>::value ? Element::kFloat : Element::kBfloat16;

template <int V>
dim3 grid_of(const Sizes& s, int64_t strips) {
  const int64_t packs = ceil_div(s.across() * s.depth(), V);
  return {static_cast<unsigned>(strips), static_cast<unsigned>(ceil_div(packs, int64_t{kThreads} * kPacksEach))};
}

template <class Video, class T>
int run_gather(const Video* video, const Sizes& s, const Moments& m, int64_t first, int64_t count, T* patches,
               cudaStream_t stream) {
  if (count == 0 || s.across() * s.depth() == 0) return 0;
  constexpr int V = kWide<T>;
  const Strips strips(s);
  const auto from = static_cast<int>(first);
  if (s.run() % V == 0 && aligned(V * sizeof(Video), video) && aligned(16, patches)) {
    gather<Video, T, V><<<grid_of<V>(s, count), kThreads, 0, stream>>>(video, strips, m, from, patches);
  } else {
    gather<Video, T, 1><<<grid_of<1>(s, count), kThreads, 0, stream>>>(video, strips, m, from, patches);
  }
  return launched();
}

template <class T>
int run_scatter(const T* patches_grad, const Sizes& s, const Moments& m, float* video_grad, cudaStream_t stream) {
  if (s.strips() == 0 || s.across() * s.depth() == 0) return 0;
  constexpr int V = kWide<float>;
  const Strips strips(s);
  if (s.run() % V == 0 && aligned(16, patches_grad, video_grad)) {
    scatter<T, V><<<grid_of<V>(s, s.strips()), kThreads, 0, stream>>>(patches_grad, strips, m, video_grad);
  } else {
    scatter<T, 1><<<grid_of<1>(s, s.strips()), kThreads, 0, stream>>>(patches_grad, strips, m, video_grad);
  }
  return launched();
}

template <class T>
int run_fill(const T* bias, int64_t rows, int64_t columns, T* tokens, cudaStream_t stream) {
  if (rows == 0 || columns == 0) return 0;
  const bool wide = rows_aligned<T>(columns, bias, tokens);
  auto kernel = wide ? fill_bias<T, kWide<T>> : fill_bias<T, 1>;
  const unsigned threads = threads_for(wide ? columns / kWide<T> : columns, kThreads);
  kernel<<<static_cast<unsigned>(rows), threads, 0, stream>>>(bias, columns, tokens);
  return launched();
}

template <class T>
int64_t strip_bytes(const Sizes& s) {
  return larger(1, s.across() * s.depth() * static_cast<int64_t>(sizeof(T)));
}
// Strips of one slab of the forward pass.
template <class T>
int64_t slab_strips(const Sizes& s) {
  return larger(1, smaller(s.strips(), kSlabBytes / strip_bytes<T>(s)));
}
int64_t sums(const Sizes& s) { return larger(1, smaller(kMostSums, ceil_div(s.tokens(), kSumRows))); }
int64_t sum_bytes(const Sizes& s) { return round_up(sums(s) * s.D * static_cast<int64_t>(sizeof(float)), 256); }

template <class T>
int64_t forward_bytes(const Sizes& s) {
  return kBlasWorkspace + slab_strips<T>(s) * strip_bytes<T>(s);
}
template <class T>
int64_t backward_bytes(const Sizes& s) {
  return kBlasWorkspace + sum_bytes(s) + s.strips() * strip_bytes<T>(s);
}

template <class Video, class T>
int run_forward(const Video* video, const T* weight, const T* bias, const float* mean, const float* deviation,
                T* tokens, const Sizes& s, void* workspace, void* stream_pointer) {
  if (!s.valid()) return static_cast<int>(cudaErrorInvalidValue);
  cudaStream_t stream = as_stream(stream_pointer);
  auto* patches = reinterpret_cast<T*>(static_cast<char*>(workspace) + kBlasWorkspace);
  const Moments m = moments<Video>(mean, deviation, s.C);
  Blas blas;
  int code = blas.open(stream, workspace);
  const int64_t slab = slab_strips<T>(s);
  for (int64_t first = 0; first < s.strips() && code == 0; first += slab) {
    const int64_t count = smaller(slab, s.strips() - first);
    const Product product{false, false, count * s.across(), s.D, s.depth()};
    T* out = tokens + first * s.across() * s.D;
    code = run_fill(bias, product.m, s.D, out, stream);
    if (code == 0) code = run_gather(video, s, m, first, count, patches, stream);
    if (code == 0) code = blas.gemm(kElement<T>, product, patches, weight, 1.0f, out);
  }
  return code;
}

// `weight` is read, and video_grad written, if video_grad is not null.
template <class Video, class T>
int run_backward(const Video* video, const T* weight, const T* tokens_grad, const float* mean, const float* deviation,
                 T* weight_grad, T* bias_grad, float* video_grad, const Sizes& s, void* workspace,
                 void* stream_pointer) {
  if (!s.valid()) return static_cast<int>(cudaErrorInvalidValue);
  cudaStream_t stream = as_stream(stream_pointer);
  char* after_blas = static_cast<char*>(workspace) + kBlasWorkspace;
  auto* partial = reinterpret_cast<float*>(after_blas);
  auto* patches = reinterpret_cast<T*>(after_blas + sum_bytes(s));
  const Moments m = moments<Video>(mean, deviation, s.C);
  const int64_t tokens = s.tokens();
  Blas blas;
  int code = blas.open(stream, workspace);
  if (code == 0) code = launch_sum_rows(tokens_grad, tokens, s.D, sums(s), partial, stream);
  if (code == 0) code = launch_sum_rows(partial, sums(s), s.D, 1, bias_grad, stream);
  if (code == 0) code = run_gather(video, s, m, 0, s.strips(), patches, stream);
  const Product of_weight{true, false, s.depth(), s.D, tokens};
  if (code == 0) code = blas.gemm(kElement<T>, of_weight, patches, tokens_grad, 0.0f, weight_grad);
  if (code != 0 || video_grad == nullptr) return code;
  const Product of_patches{false, true, tokens, s.depth(), s.D};
  code = blas.gemm(kElement<T>, of_patches, tokens_grad, weight, 0.0f, patches);
  return code != 0 ? code : run_scatter(patches, s, m, video_grad, stream);
}

}  // namespace
}  // namespace cuda
}  // namespace ernie5

using namespace ernie5::cuda;

#define SIZES \
  Sizes { B, T, H, W, C, pt, ph, pw, lead, D }

extern "C" {

int64_t ernie5_patch_embed_forward_cuda_workspace_bytes_f32(ERNIE5_PATCH_EMBED_CUDA_SIZES) {
  return forward_bytes<float>(SIZES);
}

int64_t ernie5_patch_embed_forward_cuda_workspace_bytes_bf16(ERNIE5_PATCH_EMBED_CUDA_SIZES) {
  return forward_bytes<bf16>(SIZES);
}

int64_t ernie5_patch_embed_backward_cuda_workspace_bytes_f32(ERNIE5_PATCH_EMBED_CUDA_SIZES) {
  return backward_bytes<float>(SIZES);
}

int64_t ernie5_patch_embed_backward_cuda_workspace_bytes_bf16(ERNIE5_PATCH_EMBED_CUDA_SIZES) {
  return backward_bytes<bf16>(SIZES);
}

int ernie5_patch_embed_forward_cuda_u8_f32(const uint8_t* video, const float* weight, const float* bias,
                                           const float* mean, const float* deviation, float* tokens,
                                           ERNIE5_PATCH_EMBED_CUDA_SIZES, void* workspace, void* stream) {
  return run_forward(video, weight, bias, mean, deviation, tokens, SIZES, workspace, stream);
}

int ernie5_patch_embed_forward_cuda_f32_f32(const float* video, const float* weight, const float* bias,
                                            const float* mean, const float* deviation, float* tokens,
                                            ERNIE5_PATCH_EMBED_CUDA_SIZES, void* workspace, void* stream) {
  return run_forward(video, weight, bias, mean, deviation, tokens, SIZES, workspace, stream);
}

int ernie5_patch_embed_forward_cuda_u8_bf16(const uint8_t* video, const uint16_t* weight, const uint16_t* bias,
                                            const float* mean, const float* deviation, uint16_t* tokens,
                                            ERNIE5_PATCH_EMBED_CUDA_SIZES, void* workspace, void* stream) {
  return run_forward(video, typed(weight), typed(bias), mean, deviation, typed(tokens), SIZES, workspace, stream);
}

int ernie5_patch_embed_forward_cuda_f32_bf16(const float* video, const uint16_t* weight, const uint16_t* bias,
                                             const float* mean, const float* deviation, uint16_t* tokens,
                                             ERNIE5_PATCH_EMBED_CUDA_SIZES, void* workspace, void* stream) {
  return run_forward(video, typed(weight), typed(bias), mean, deviation, typed(tokens), SIZES, workspace, stream);
}

int ernie5_patch_embed_backward_cuda_u8_f32(const uint8_t* video, const float* tokens_grad, const float* mean,
                                            const float* deviation, float* weight_grad, float* bias_grad,
                                            ERNIE5_PATCH_EMBED_CUDA_SIZES, void* workspace, void* stream) {
  return run_backward(video, static_cast<const float*>(nullptr), tokens_grad, mean, deviation, weight_grad, bias_grad,
                      nullptr, SIZES, workspace, stream);
}

int ernie5_patch_embed_backward_cuda_f32_f32(const float* video, const float* weight, const float* tokens_grad,
                                             const float* mean, const float* deviation, float* weight_grad,
                                             float* bias_grad, float* video_grad, ERNIE5_PATCH_EMBED_CUDA_SIZES,
                                             void* workspace, void* stream) {
  return run_backward(video, weight, tokens_grad, mean, deviation, weight_grad, bias_grad, video_grad, SIZES,
                      workspace, stream);
}

int ernie5_patch_embed_backward_cuda_u8_bf16(const uint8_t* video, const uint16_t* tokens_grad, const float* mean,
                                             const float* deviation, uint16_t* weight_grad, uint16_t* bias_grad,
                                             ERNIE5_PATCH_EMBED_CUDA_SIZES, void* workspace, void* stream) {
  return run_backward(video, static_cast<const bf16*>(nullptr), typed(tokens_grad), mean, deviation,
                      typed(weight_grad), typed(bias_grad), nullptr, SIZES, workspace, stream);
}

int ernie5_patch_embed_backward_cuda_f32_bf16(const float* video, const uint16_t* weight, const uint16_t* tokens_grad,
                                              const float* mean, const float* deviation, uint16_t* weight_grad,
                                              uint16_t* bias_grad, float* video_grad, ERNIE5_PATCH_EMBED_CUDA_SIZES,
                                              void* workspace, void* stream) {
  return run_backward(video, typed(weight), typed(tokens_grad), mean, deviation, typed(weight_grad), typed(bias_grad),
                      video_grad, SIZES, workspace, stream);
}

}  // extern "C"
