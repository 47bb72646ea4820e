// Paddle operator ernie5_patch_embed; meaning and shapes in patch_embed.h.
//   inputs video [B,T,H,W,C] uint8 or float32; weight [pt*ph*pw*C, D] and bias [D], both float32 or both bfloat16.
//   attributes patch (pt, ph, pw), mean and deviation (a number a channel), lead, video_gradient.
//   output tokens [B, T'*H'*W', D] like the weight. Gradients of weight and bias, and of a float video where
//   video_gradient asks for it; else one meaningless number stands in its place, which Paddle drops for an input that
//   needs no gradient.
#pragma once

#include <vector>

#include "common/binding.h"
#include "patch_embed/patch_embed.h"
#ifdef PADDLE_WITH_CUDA
#include "patch_embed/patch_embed_cuda.h"
#endif

namespace ernie5 {
namespace patch_embed_binding {

using binding::data;
using paddle::DataType;
using paddle::Tensor;
using Shape = std::vector<int64_t>;
using Ints = std::vector<int>;
using Floats = std::vector<float>;

struct Sizes {
  int64_t B, T, H, W, C, pt, ph, pw, lead, D;
  int64_t tokens() const { return (T > 0 ? (lead + T + pt - 1) / pt : 0) * (H / ph) * (W / pw); }
};

inline Sizes sizes_of(const Tensor& video, const Tensor& weight, const Ints& patch, const Floats& mean,
                      const Floats& deviation, int lead) {
  binding::check_place("patch_embed", weight, {&video});
  PD_CHECK(video.dtype() == DataType::UINT8 || video.dtype() == DataType::FLOAT32,
           "patch_embed: video must be uint8 or float32");
  PD_CHECK(weight.dtype() == DataType::FLOAT32 || weight.dtype() == DataType::BFLOAT16,
           "patch_embed: weight must be float32 or bfloat16");
  const Shape v = video.shape(), w = weight.shape();
  PD_CHECK(v.size() == 5 && w.size() == 2, "patch_embed: video must be [B,T,H,W,C], weight [K,D]");
  PD_CHECK(patch.size() == 3 && patch[0] > 0 && patch[1] > 0 && patch[2] > 0, "patch_embed: patch must be (pt,ph,pw)");
  const Sizes s{v[0], v[1], v[2], v[3], v[4], patch[0], patch[1], patch[2], lead, w[1]};
  PD_CHECK(s.H % s.ph == 0 && s.W % s.pw == 0, "patch_embed: H and W must be multiples of the patch");
  PD_CHECK(0 <= lead && lead < s.pt, "patch_embed: lead must lie in 0 .. pt-1");
  PD_CHECK(w[0] == s.pt * s.ph * s.pw * s.C, "patch_embed: weight must have pt*ph*pw*C rows");
  PD_CHECK(static_cast<int64_t>(mean.size()) == s.C && static_cast<int64_t>(deviation.size()) == s.C,
           "patch_embed: mean and deviation must hold a number a channel");
  return s;
}

#define ERNIE5_PATCH_EMBED_LIST s.B, s.T, s.H, s.W, s.C, s.pt, s.ph, s.pw, s.lead, s.D

inline std::vector<Tensor> forward(const Tensor& video, const Tensor& weight, const Tensor& bias, const Ints& patch,
                                   const Floats& mean, const Floats& deviation, int lead, bool /*video_gradient*/) {
  const Sizes s = sizes_of(video, weight, patch, mean, deviation, lead);
  binding::check_place("patch_embed", weight, {&bias});
  PD_CHECK(bias.dtype() == weight.dtype() && bias.numel() == s.D,
           "patch_embed: bias must be [D], of the weight's type");
  Tensor tokens = paddle::empty({s.B, s.tokens(), s.D}, weight.dtype(), weight.place());
  auto run_on = [&](auto pixel) {
    return [&](auto zero, auto launcher, auto... more) {
      using T = decltype(zero);
      return launcher(data<decltype(pixel)>(video), data<T>(weight), data<T>(bias), mean.data(), deviation.data(),
                      data<T>(tokens), ERNIE5_PATCH_EMBED_LIST, more...);
    };
  };
  const auto run_u8 = run_on(uint8_t{});
  const auto run_f32 = run_on(float{});
  const bool bytes = video.dtype() == DataType::UINT8;
#ifdef PADDLE_WITH_CUDA
  if (weight.is_gpu()) {
    auto size = [&](auto /*zero*/, auto of) { return of(ERNIE5_PATCH_EMBED_LIST); };
    Tensor space = binding::workspace(binding::by_type(weight, size,
                                                       ernie5_patch_embed_forward_cuda_workspace_bytes_f32,
                                                       ernie5_patch_embed_forward_cuda_workspace_bytes_bf16),
                                      weight);
    bytes ? binding::launch("patch_embed", weight, run_u8, ernie5_patch_embed_forward_cuda_u8_f32,
                            ernie5_patch_embed_forward_cuda_u8_bf16, space.data())
          : binding::launch("patch_embed", weight, run_f32, ernie5_patch_embed_forward_cuda_f32_f32,
                            ernie5_patch_embed_forward_cuda_f32_bf16, space.data());
    return {tokens};
  }
#endif
  bytes ? binding::by_type(weight, run_u8, ernie5_patch_embed_forward_cpu_u8_f32,
                           ernie5_patch_embed_forward_cpu_u8_bf16)
        : binding::by_type(weight, run_f32, ernie5_patch_embed_forward_cpu_f32_f32,
                           ernie5_patch_embed_forward_cpu_f32_bf16);
  return {tokens};
}

inline std::vector<Tensor> backward(const Tensor& video, const Tensor& weight, const Tensor& bias,
                                    const Tensor& tokens_grad, const Ints& patch, const Floats& mean,
                                    const Floats& deviation, int lead, bool video_gradient) {
  const Sizes s = sizes_of(video, weight, patch, mean, deviation, lead);
  PD_CHECK(tokens_grad.dtype() == weight.dtype() && tokens_grad.numel() == s.B * s.tokens() * s.D,
           "patch_embed: the tokens' gradient has another type or shape than the tokens");
  const bool bytes = video.dtype() == DataType::UINT8, wanted = video_gradient && !bytes;
  Tensor weight_grad = paddle::empty_like(weight), bias_grad = paddle::empty_like(bias);
  Tensor video_grad = paddle::empty(wanted ? video.shape() : Shape{1}, DataType::FLOAT32, video.place());
  auto run_u8 = [&](auto zero, auto launcher, auto... more) {
    using T = decltype(zero);
    return launcher(data<uint8_t>(video), data<T>(tokens_grad), mean.data(), deviation.data(), data<T>(weight_grad),
                    data<T>(bias_grad), ERNIE5_PATCH_EMBED_LIST, more...);
  };
  auto run_f32 = [&](auto zero, auto launcher, auto... more) {
    using T = decltype(zero);
    return launcher(data<float>(video), data<T>(weight), data<T>(tokens_grad), mean.data(), deviation.data(),
                    data<T>(weight_grad), data<T>(bias_grad), data<float>(wanted ? &video_grad : nullptr),
                    ERNIE5_PATCH_EMBED_LIST, more...);
  };
#ifdef PADDLE_WITH_CUDA
  if (weight.is_gpu()) {
    auto size = [&](auto /*zero*/, auto of) { return of(ERNIE5_PATCH_EMBED_LIST); };
    Tensor space = binding::workspace(binding::by_type(weight, size,
                                                       ernie5_patch_embed_backward_cuda_workspace_bytes_f32,
                                                       ernie5_patch_embed_backward_cuda_workspace_bytes_bf16),
                                      weight);
    bytes ? binding::launch("patch_embed", weight, run_u8, ernie5_patch_embed_backward_cuda_u8_f32,
                            ernie5_patch_embed_backward_cuda_u8_bf16, space.data())
          : binding::launch("patch_embed", weight, run_f32, ernie5_patch_embed_backward_cuda_f32_f32,
                            ernie5_patch_embed_backward_cuda_f32_bf16, space.data());
    return {video_grad, weight_grad, bias_grad};
  }
#endif
  bytes ? binding::by_type(weight, run_u8, ernie5_patch_embed_backward_cpu_u8_f32,
                           ernie5_patch_embed_backward_cpu_u8_bf16)
        : binding::by_type(weight, run_f32, ernie5_patch_embed_backward_cpu_f32_f32,
                           ernie5_patch_embed_backward_cpu_f32_bf16);
  return {video_grad, weight_grad, bias_grad};
}

#undef ERNIE5_PATCH_EMBED_LIST

// A static graph may leave sizes open (-1); what depends on one of them stays open.
inline std::vector<Shape> forward_shapes(const Shape& video, const Shape& weight, const Shape&, const Ints& patch,
                                         const Floats&, const Floats&, int lead, bool) {
  const bool open = video[1] < 0 || video[2] < 0 || video[3] < 0;
  const Sizes s{video[0], video[1], video[2], video[3], video[4], patch[0], patch[1], patch[2], lead, weight[1]};
  return {{s.B, open ? -1 : s.tokens(), s.D}};
}
inline std::vector<DataType> forward_types(const DataType&, const DataType& weight, const DataType&) {
  return {weight};
}

}  // namespace patch_embed_binding
}  // namespace ernie5

PD_BUILD_OP(ernie5_patch_embed)
    .Inputs({"video", "weight", "bias"})
    .Outputs({"tokens"})
    .Attrs({"patch: std::vector<int>", "mean: std::vector<float>", "deviation: std::vector<float>", "lead: int",
            "video_gradient: bool"})
    .SetKernelFn(PD_KERNEL(ernie5::patch_embed_binding::forward))
    .SetInferShapeFn(PD_INFER_SHAPE(ernie5::patch_embed_binding::forward_shapes))
    .SetInferDtypeFn(PD_INFER_DTYPE(ernie5::patch_embed_binding::forward_types));

PD_BUILD_GRAD_OP(ernie5_patch_embed)
    .Inputs({"video", "weight", "bias", paddle::Grad("tokens")})
    .Outputs({paddle::Grad("video"), paddle::Grad("weight"), paddle::Grad("bias")})
    .Attrs({"patch: std::vector<int>", "mean: std::vector<float>", "deviation: std::vector<float>", "lead: int",
            "video_gradient: bool"})
    .SetKernelFn(PD_KERNEL(ernie5::patch_embed_binding::backward));
