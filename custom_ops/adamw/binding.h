// Paddle operators of the AdamW step and of the sum of squares, each over many tensors.
#pragma once

#include "adamw/adamw.h"
#include "paddle/extension.h"

namespace ernie5 {
namespace adamw_binding {

using paddle::DataType;
using paddle::Tensor;
using Shape = std::vector<int64_t>;
using Shapes = std::vector<Shape>;
using Tensors = std::vector<Tensor>;
using Types = std::vector<DataType>;

// Pointers to the data of tensors that must have one dtype, lie on the CPU and be as large as `sizes` says (if given).
template <class T>
std::vector<T*> pointers(const Tensors& tensors, DataType dtype, const std::vector<int64_t>* sizes, const char* what) {
  std::vector<T*> found;
  found.reserve(tensors.size());
  PD_CHECK(sizes == nullptr || tensors.size() == sizes->size(), "adamw: ", what, " lack or exceed the parameters");
  for (size_t i = 0; i < tensors.size(); ++i) {
    PD_CHECK(tensors[i].is_cpu() && tensors[i].dtype() == dtype, "adamw: ", what, " have the wrong dtype or place");
    PD_CHECK(sizes == nullptr || tensors[i].numel() == (*sizes)[i], "adamw: ", what, " differ from the parameters");
    found.push_back(static_cast<T*>(const_cast<void*>(tensors[i].data())));
  }
  return found;
}

inline std::vector<int64_t> sizes_of(const Tensors& tensors) {
  std::vector<int64_t> sizes;
  sizes.reserve(tensors.size());
  for (const Tensor& tensor : tensors) sizes.push_back(tensor.numel());
  return sizes;
}

// The value of each one-element tensor, which is then multiplied by beta.
inline std::vector<float> take_powers(const Tensors& tensors, size_t count, float beta) {
  PD_CHECK(tensors.size() == count, "adamw: the powers lack or exceed the parameters");
  std::vector<float> powers;
  powers.reserve(count);
  for (const Tensor& tensor : tensors) {
    PD_CHECK(tensor.is_cpu() && tensor.dtype() == DataType::FLOAT32 && tensor.numel() == 1,
             "adamw: powers must be float32 [1] on the CPU");
    float* value = const_cast<float*>(tensor.data<float>());
    powers.push_back(*value);
    *value *= beta;
  }
  return powers;
}

// Changes parameters, moments, powers (and copies) in place; the output counts the tensors that were updated.
inline Tensors step(const Tensors& parameters, const Tensors& gradients, const Tensors& first, const Tensors& second,
                    const Tensors& first_powers, const Tensors& second_powers,
                    const paddle::optional<Tensors>& copies, const std::vector<float>& rates,
                    const std::vector<float>& decays, float beta1, float beta2, float epsilon,
                    float gradient_factor) {
  const size_t count = parameters.size();
  PD_CHECK(rates.size() == count && decays.size() == count, "adamw: rates and decays must be one a parameter");
  const std::vector<int64_t> sizes = sizes_of(parameters);
  const auto p = pointers<float>(parameters, DataType::FLOAT32, &sizes, "parameters");
  const auto m = pointers<float>(first, DataType::FLOAT32, &sizes, "first moments");
  const auto v = pointers<float>(second, DataType::FLOAT32, &sizes, "second moments");
  const DataType kind = count > 0 ? gradients.at(0).dtype() : DataType::FLOAT32;
  PD_CHECK(kind == DataType::FLOAT32 || kind == DataType::BFLOAT16, "adamw: gradients must be float32 or bfloat16");
  const auto g = pointers<const void>(gradients, kind, &sizes, "gradients");
  std::vector<uint16_t*> c;
  if (copies && !copies->empty()) c = pointers<uint16_t>(*copies, DataType::BFLOAT16, &sizes, "copies");
  const auto m_powers = take_powers(first_powers, count, beta1), v_powers = take_powers(second_powers, count, beta2);
  uint16_t* const* copy = c.empty() ? nullptr : c.data();
  const auto tensors = static_cast<int64_t>(count);
  if (kind == DataType::FLOAT32) {
    ernie5_adamw_forward_cpu_f32(tensors, sizes.data(), p.data(), m.data(), v.data(),
                                 reinterpret_cast<const float* const*>(g.data()), copy, rates.data(), decays.data(),
                                 m_powers.data(), v_powers.data(), beta1, beta2, epsilon, gradient_factor);
  } else {
    ernie5_adamw_forward_cpu_bf16(tensors, sizes.data(), p.data(), m.data(), v.data(),
                                  reinterpret_cast<const uint16_t* const*>(g.data()), copy, rates.data(),
                                  decays.data(), m_powers.data(), v_powers.data(), beta1, beta2, epsilon,
                                  gradient_factor);
  }
  return {paddle::full({1}, tensors, DataType::INT64, paddle::CPUPlace())};
}

// Tensors of one dtype -> float64 [1].
inline Tensors sum_of_squares(const Tensors& values) {
  Tensor total = paddle::empty({1}, DataType::FLOAT64, paddle::CPUPlace());
  const DataType kind = values.empty() ? DataType::FLOAT32 : values[0].dtype();
  PD_CHECK(kind == DataType::FLOAT32 || kind == DataType::BFLOAT16, "sum_of_squares: float32 or bfloat16");
  const std::vector<int64_t> sizes = sizes_of(values);
  const auto tensors = static_cast<int64_t>(values.size());
  const auto data = pointers<const void>(values, kind, nullptr, "values");
  if (kind == DataType::FLOAT32) {
    ernie5_sum_of_squares_forward_cpu_f32(tensors, sizes.data(), reinterpret_cast<const float* const*>(data.data()),
                                          total.data<double>());
  } else {
    ernie5_sum_of_squares_forward_cpu_bf16(
        tensors, sizes.data(), reinterpret_cast<const uint16_t* const*>(data.data()), total.data<double>());
  }
  return {total};
}

inline Shapes step_shapes(const Shapes&, const Shapes&, const Shapes&, const Shapes&, const Shapes&, const Shapes&,
                          const paddle::optional<Shapes>&) {
  return {{1}};
}
inline Types step_dtypes(const Types&, const Types&, const Types&, const Types&, const Types&, const Types&,
                         const paddle::optional<Types>&) {
  return {DataType::INT64};
}
inline Shapes sum_shapes(const Shapes&) { return {{1}}; }
inline Types sum_dtypes(const Types&) { return {DataType::FLOAT64}; }

}  // namespace adamw_binding
}  // namespace ernie5

PD_BUILD_OP(ernie5_adamw)
    .Inputs({paddle::Vec("parameters"), paddle::Vec("gradients"), paddle::Vec("first"), paddle::Vec("second"),
             paddle::Vec("first_powers"), paddle::Vec("second_powers"), paddle::Optional(paddle::Vec("copies"))})
    .Outputs({"updated"})
    .Attrs({"rates: std::vector<float>", "decays: std::vector<float>", "beta1: float", "beta2: float",
            "epsilon: float", "gradient_factor: float"})
    .SetKernelFn(PD_KERNEL(ernie5::adamw_binding::step))
    .SetInferShapeFn(PD_INFER_SHAPE(ernie5::adamw_binding::step_shapes))
    .SetInferDtypeFn(PD_INFER_DTYPE(ernie5::adamw_binding::step_dtypes));

PD_BUILD_OP(ernie5_sum_of_squares)
    .Inputs({paddle::Vec("values")})
    .Outputs({"total"})
    .SetKernelFn(PD_KERNEL(ernie5::adamw_binding::sum_of_squares))
    .SetInferShapeFn(PD_INFER_SHAPE(ernie5::adamw_binding::sum_shapes))
    .SetInferDtypeFn(PD_INFER_DTYPE(ernie5::adamw_binding::sum_dtypes));
