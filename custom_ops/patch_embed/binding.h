// Paddle operator ernie5_patch_embed; meaning and shapes in patch_embed.h.
//   inputs video [B,T,H,W,C] uint8 or float32; weight [pt*ph*pw*C, D] and bias [D], both float32 or both bfloat16.
//   attributes patch (pt, ph, pw), mean and deviation (a number a channel), lead, video_gradient.
//   output tokens [B, T'*H'*W', D] like the weight. Gradients of weight and bias, and of a float video where
//   video_gradient asks for it; else one meaningless number stands in its place, which Paddle drops for an input that
//   needs no gradient.
#pragma once

#include <vector>

#include "paddle/extension.h"
#include "patch_embed/patch_embed.h"

namespace ernie5 {
namespace patch_embed_binding {

using paddle::DataType;
using paddle::Tensor;
using Shape = std::vector<int64_t>;
using Ints = std::vector<int>;
using Floats = std::vector<float>;

template <class T>
const T* data(const Tensor& tensor) {
  return reinterpret_cast<const T*>(tensor.data());
}
template <class T>
T* data(Tensor& tensor) {
  return reinterpret_cast<T*>(tensor.data());
}

struct Sizes {
  int64_t B, T, H, W, C, pt, ph, pw, lead, D;
  int64_t tokens() const { return (T > 0 ? (lead + T + pt - 1) / pt : 0) * (H / ph) * (W / pw); }
};

inline Sizes sizes_of(const Tensor& video, const Tensor& weight, const Ints& patch, const Floats& mean,
                      const Floats& deviation, int lead) {
  PD_CHECK(video.is_cpu() && weight.is_cpu(), "patch_embed: the tensors must lie on the CPU");
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
  PD_CHECK(bias.is_cpu() && bias.dtype() == weight.dtype() && bias.numel() == s.D,
           "patch_embed: bias must be [D], of the weight's type");
  Tensor tokens = paddle::empty({s.B, s.tokens(), s.D}, weight.dtype(), weight.place());
  const bool bytes = video.dtype() == DataType::UINT8;
  if (weight.dtype() == DataType::FLOAT32) {
    const auto *w = data<float>(weight), *b = data<float>(bias);
    auto* out = data<float>(tokens);
    bytes ? ernie5_patch_embed_forward_cpu_u8_f32(data<uint8_t>(video), w, b, mean.data(), deviation.data(), out,
                                                  ERNIE5_PATCH_EMBED_LIST)
          : ernie5_patch_embed_forward_cpu_f32_f32(data<float>(video), w, b, mean.data(), deviation.data(), out,
                                                   ERNIE5_PATCH_EMBED_LIST);
  } else {
    const auto *w = data<uint16_t>(weight), *b = data<uint16_t>(bias);
    auto* out = data<uint16_t>(tokens);
    bytes ? ernie5_patch_embed_forward_cpu_u8_bf16(data<uint8_t>(video), w, b, mean.data(), deviation.data(), out,
                                                   ERNIE5_PATCH_EMBED_LIST)
          : ernie5_patch_embed_forward_cpu_f32_bf16(data<float>(video), w, b, mean.data(), deviation.data(), out,
                                                    ERNIE5_PATCH_EMBED_LIST);
  }
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
  float* pixels = wanted ? data<float>(video_grad) : nullptr;
  if (weight.dtype() == DataType::FLOAT32) {
    const auto *w = data<float>(weight), *grad = data<float>(tokens_grad);
    auto *dw = data<float>(weight_grad), *db = data<float>(bias_grad);
    bytes ? ernie5_patch_embed_backward_cpu_u8_f32(data<uint8_t>(video), grad, mean.data(), deviation.data(), dw, db,
                                                   ERNIE5_PATCH_EMBED_LIST)
          : ernie5_patch_embed_backward_cpu_f32_f32(data<float>(video), w, grad, mean.data(), deviation.data(), dw, db,
                                                    pixels, ERNIE5_PATCH_EMBED_LIST);
  } else {
    const auto *w = data<uint16_t>(weight), *grad = data<uint16_t>(tokens_grad);
    auto *dw = data<uint16_t>(weight_grad), *db = data<uint16_t>(bias_grad);
    bytes ? ernie5_patch_embed_backward_cpu_u8_bf16(data<uint8_t>(video), grad, mean.data(), deviation.data(), dw, db,
                                                    ERNIE5_PATCH_EMBED_LIST)
          : ernie5_patch_embed_backward_cpu_f32_bf16(data<float>(video), w, grad, mean.data(), deviation.data(), dw,
                                                     db, pixels, ERNIE5_PATCH_EMBED_LIST);
  }
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
