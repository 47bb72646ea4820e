// Paddle operator ernie5_decode_step: see decode_step.h for the tables `model` and `cache`, which hold addresses.
//   inputs: model int64 [*]; cache int64 [2 + 2L]; hidden float [B,n,D] or none; ids int64 [B,n] or none (one of them);
//           positions float [B,n,3]; intervals int32 [B,1,M,4]; valid bool [B,n]. ids, positions and valid may also be
//           those of whole sequences, [B,S] and [B,S,3] with S > n: then rows query_start .. are taken
//   attributes: rows (n), query_start, first, last (int64), with_logits (bool)
//   outputs: hidden float [B,n,D]; logits float [B,V], or [0] when not asked for. With logits, only the last row of each
//   sequence is the state behind the layers
// Paddle operator ernie5_decode_text: tokens of text after the row query_start, see decode_step.h
//   inputs: model and cache as above; ids int64 [B], the tokens of that row; positions float [B,S,3]; intervals int32
//           [B,1,M,4]; valid bool [B,S]; following, missing uint8 [4,W]; states int64 [B]; uniforms double [B,count]
//   attributes: query_start, end, left, top_k (int64), temperature, top_p (double)
//   outputs: chosen int64 [B,count]; states int64 [B]; written int64 [1], how many columns of chosen are filled
// The caller keeps the memory behind the addresses alive. The cache is written in place.
#pragma once

#include <algorithm>
#include <vector>

#include "decode_step/decode_step.h"
#include "paddle/extension.h"

namespace ernie5 {
namespace decode_step_binding {

using paddle::Tensor;

inline const int64_t* table(const Tensor& values, int64_t header, int64_t each, int64_t layers) {
  PD_CHECK(values.is_cpu() && values.dtype() == paddle::DataType::INT64, "decode_step takes int64 tables on the CPU");
  int64_t expected = header + each * layers;
  PD_CHECK(values.numel() == expected, "decode_step: a table holds ", values.numel(), " values, not ", expected);
  return values.data<int64_t>();
}

inline void check_ids(const int64_t* ids, int64_t batch, int64_t rows, int64_t stride, int64_t vocabulary) {
  for (int64_t i = 0; i < batch * rows; ++i) {
    int64_t id = ids[i / rows * stride + i % rows];
    PD_CHECK(id >= 0 && id < vocabulary, "decode_step: id ", id, " is not in the vocabulary of ", vocabulary);
  }
}

inline std::vector<Tensor> forward(const Tensor& model_table, const Tensor& cache_table,
                                   const paddle::optional<Tensor>& hidden, const paddle::optional<Tensor>& ids,
                                   const Tensor& positions, const Tensor& intervals, const Tensor& valid, int64_t rows,
                                   int64_t query_start, int64_t first, int64_t last, bool logits) {
  PD_CHECK(model_table.numel() >= kModelHeader, "decode_step: the model's table is too short");
  int64_t layers = model_table.data<int64_t>()[kLayers];
  const int64_t* model = table(model_table, kModelHeader, kLayerPointers, layers);
  const int64_t* cache = table(cache_table, kCacheHeader, 2, layers);
  std::vector<int64_t> shape = positions.shape();
  PD_CHECK(shape.size() == 3 && shape[2] == 3, "decode_step: positions are [B, n, 3]");
  int64_t batch = shape[0], stride = shape[1], columns = intervals.shape()[2];
  int64_t skipped = stride > rows ? query_start : 0;
  PD_CHECK(intervals.numel() == batch * columns * 4, "decode_step: intervals are [B, 1, M, 4]");
  PD_CHECK(rows > 0 && skipped + rows <= stride, "decode_step: ", stride, " positions do not hold the rows");
  PD_CHECK(valid.numel() == batch * stride, "decode_step: valid and positions differ in shape");
  PD_CHECK(0 <= query_start && query_start + rows <= columns, "decode_step: rows ", query_start, " to ",
           query_start + rows, " of ", columns, " columns");
  PD_CHECK(cache[kCacheBatch] == batch && query_start + rows <= cache[kCapacity],
           "decode_step: the cache holds ", cache[kCacheBatch], " sequences of ", cache[kCapacity], " rows at most");
  PD_CHECK(0 <= first && first < last && last <= layers, "decode_step: layers ", first, " to ", last, " of ", layers);
  PD_CHECK(hidden.is_initialized() != ids.is_initialized(), "decode_step takes either hidden states or ids");
  shape = {batch, rows, model[kHidden]};
  const int64_t* tokens = nullptr;
  if (ids) {
    PD_CHECK(ids->numel() == batch * stride, "decode_step: ids and positions differ in shape");
    tokens = ids->data<int64_t>() + skipped;
    check_ids(tokens, batch, rows, stride, model[kVocabulary]);
  } else {
    PD_CHECK(hidden->shape() == shape, "decode_step: hidden is [B, n, D]");
  }
  Tensor out = paddle::empty(shape, paddle::DataType::FLOAT32, paddle::CPUPlace());
  std::vector<int64_t> scores_shape{0};
  if (logits) scores_shape = {batch, model[kVocabulary]};
  Tensor scores = paddle::empty(scores_shape, paddle::DataType::FLOAT32, paddle::CPUPlace());
  int failed = ernie5_decode_step_forward_cpu(
      model, cache, hidden ? hidden->data<float>() : nullptr, tokens, positions.data<float>() + 3 * skipped,
      intervals.data<int32_t>(), columns, reinterpret_cast<const uint8_t*>(valid.data<bool>()) + skipped, batch, rows,
      stride, query_start, first, last, out.data<float>(), logits ? scores.data<float>() : nullptr);
  PD_CHECK(failed == 0, "decode_step: out of memory");
  return {out, scores};
}

inline std::vector<Tensor> text(const Tensor& model_table, const Tensor& cache_table, const Tensor& ids,
                                const Tensor& positions, const Tensor& intervals, const Tensor& valid,
                                const Tensor& following, const Tensor& missing, const Tensor& states,
                                const Tensor& uniforms, int64_t query_start, int64_t end, int64_t left, int64_t top_k,
                                double temperature, double top_p) {
  PD_CHECK(model_table.numel() >= kModelHeader, "decode_text: the model's table is too short");
  int64_t layers = model_table.data<int64_t>()[kLayers];
  const int64_t* model = table(model_table, kModelHeader, kLayerPointers, layers);
  const int64_t* cache = table(cache_table, kCacheHeader, 2, layers);
  std::vector<int64_t> shape = positions.shape();
  PD_CHECK(shape.size() == 3 && shape[2] == 3, "decode_text: positions are [B, S, 3]");
  int64_t batch = shape[0], stride = shape[1], columns = intervals.shape()[2], width = missing.shape()[1];
  PD_CHECK(uniforms.shape().size() == 2 && uniforms.shape()[0] == batch, "decode_text: uniforms are [B, count]");
  int64_t count = uniforms.shape()[1], stop = query_start + count;
  PD_CHECK(ids.numel() == batch && states.numel() == batch, "decode_text: ids and states are [B]");
  PD_CHECK(intervals.numel() == batch * columns * 4, "decode_text: intervals are [B, 1, M, 4]");
  PD_CHECK(valid.numel() == batch * stride, "decode_text: valid and positions differ in shape");
  PD_CHECK(0 <= query_start && stop <= columns && stop <= stride, "decode_text: rows ", query_start, " to ", stop, " of ",
           std::min(columns, stride), " columns");
  PD_CHECK(cache[kCacheBatch] == batch && stop <= cache[kCapacity], "decode_text: the cache holds ", cache[kCacheBatch],
           " sequences of ", cache[kCapacity], " rows at most");
  constexpr int64_t kStates = 4;
  PD_CHECK(missing.numel() == kStates * width && following.shape() == missing.shape() && width <= model[kVocabulary],
           "decode_text: following and missing are [4, W], W at most ", model[kVocabulary]);
  PD_CHECK(0 <= end && end < width && temperature >= 0.0, "decode_text: the end is token ", end, " of ", width);
  check_ids(ids.data<int64_t>(), batch, 1, 1, model[kVocabulary]);
  for (int64_t b = 0; b < batch; ++b) {
    int64_t state = states.data<int64_t>()[b];
    PD_CHECK(state >= 0 && (state < kStates || ids.data<int64_t>()[b] == end), "decode_text: state ", state);
  }
  auto empty = [](std::vector<int64_t> sizes, paddle::DataType type) {
    return paddle::empty(sizes, type, paddle::CPUPlace());
  };
  Tensor chosen = empty({batch, count}, paddle::DataType::INT64), written = empty({1}, paddle::DataType::INT64);
  Tensor out = empty({batch, model[kHidden]}, paddle::DataType::FLOAT32);
  Tensor logits = empty({batch, model[kVocabulary]}, paddle::DataType::FLOAT32);
  Tensor last = ids.copy_to(paddle::CPUPlace(), true), after = states.copy_to(paddle::CPUPlace(), true);
  int failed = ernie5_decode_text_cpu(
      model, cache, last.data<int64_t>(), positions.data<float>() + 3 * query_start, intervals.data<int32_t>(), columns,
      reinterpret_cast<const uint8_t*>(valid.data<bool>()) + query_start, batch, stride, query_start, count,
      following.data<uint8_t>(), missing.data<uint8_t>(), width, end, left, temperature, top_k, top_p,
      uniforms.data<double>(), after.data<int64_t>(), chosen.data<int64_t>(), out.data<float>(), logits.data<float>(),
      written.data<int64_t>());
  PD_CHECK(failed == 0, "decode_text: out of memory");
  return {chosen, after, written};
}

}  // namespace decode_step_binding
}  // namespace ernie5

PD_BUILD_OP(ernie5_decode_step)
    .Inputs({"model", "cache", paddle::Optional("hidden"), paddle::Optional("ids"), "positions", "intervals", "valid"})
    .Outputs({"out", "logits"})
    .Attrs({"rows: int64_t", "query_start: int64_t", "first: int64_t", "last: int64_t", "with_logits: bool"})
    .SetKernelFn(PD_KERNEL(ernie5::decode_step_binding::forward));

PD_BUILD_OP(ernie5_decode_text)
    .Inputs({"model", "cache", "ids", "positions", "intervals", "valid", "following", "missing", "states", "uniforms"})
    .Outputs({"chosen", "after", "written"})
    .Attrs({"query_start: int64_t", "end: int64_t", "left: int64_t", "top_k: int64_t", "temperature: double",
            "top_p: double"})
    .SetKernelFn(PD_KERNEL(ernie5::decode_step_binding::text));
