// What the Paddle bindings share: where tensors must lie, their data, and the way to the CPU and CUDA launchers.
//
// A build with CUDA (PADDLE_WITH_CUDA) serves tensors on the CPU or on one GPU: where x.is_gpu(), a binding calls the
// CUDA launcher with the arguments of the CPU one, then its workspace if it takes one, then the stream. A build without
// CUDA knows the CPU alone and includes nothing of CUDA.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "common/simd.h"
#include "paddle/extension.h"
#ifdef PADDLE_WITH_CUDA
#include "common/cuda_blas.h"
#endif

namespace ernie5 {
namespace binding {

using paddle::DataType;
using paddle::Tensor;

inline void check_place(const char* op, const Tensor& first, std::initializer_list<const Tensor*> others) {
#ifdef PADDLE_WITH_CUDA
  PD_CHECK(first.is_cpu() || first.is_gpu(), op, ": the tensors must lie on the CPU or on a GPU");
#else
  PD_CHECK(first.is_cpu(), op, ": the tensors must lie on the CPU");
#endif
  for (const Tensor* other : others) {
    const bool together = first.is_cpu() ? other->is_cpu() : other->place() == first.place();
    PD_CHECK(together, op, ": the tensors must lie on one device");
  }
}

// The type that Paddle knows the elements by; ours for bfloat16 is its 16 bits.
template <class T>
struct Stored {
  using Type = T;
};
template <>
struct Stored<uint16_t> {
  using Type = phi::dtype::bfloat16;
};
template <>
struct Stored<bf16> {
  using Type = phi::dtype::bfloat16;
};

// The elements of a tensor, whose type Paddle checks.
template <class T>
const T* data(const Tensor& tensor) {
  return reinterpret_cast<const T*>(tensor.data<typename Stored<T>::Type>());
}
template <class T>
T* data(Tensor& tensor) {
  return reinterpret_cast<T*>(tensor.data<typename Stored<T>::Type>());
}
// The same of a tensor that may be missing.
template <class T>
const T* data(const Tensor* tensor) {
  return tensor != nullptr ? data<T>(*tensor) : nullptr;
}
template <class T>
T* data(Tensor* tensor) {
  return tensor != nullptr ? data<T>(*tensor) : nullptr;
}

// run(a zero of x's type, that type's launcher, more...); the launchers take bfloat16 as Half.
template <class Half = uint16_t, class Run, class F32, class Bf16, class... More>
auto by_type(const Tensor& x, Run&& run, F32 f32, Bf16 bfloat16, More... more) {
  return x.dtype() == DataType::FLOAT32 ? run(float{}, f32, more...) : run(Half{}, bfloat16, more...);
}

#ifdef PADDLE_WITH_CUDA
inline void check_code(const char* op, int code) {
  PD_CHECK(code == 0, op, " on the GPU: ", ernie5_cuda_error_text(code));
}

// by_type for CUDA launchers, which take the stream last and return a code.
template <class Run, class F32, class Bf16, class... More>
void launch(const char* op, const Tensor& x, Run&& run, F32 f32, Bf16 bfloat16, More... more) {
  check_code(op, by_type(x, run, f32, bfloat16, more..., static_cast<void*>(x.stream())));
}

// Scratch memory beside x. Freed when the binding returns: Paddle reuses it behind what the stream still has to do.
inline Tensor workspace(int64_t bytes, const Tensor& x) {
  return paddle::empty({bytes > 0 ? bytes : 1}, DataType::UINT8, x.place());
}
#endif

}  // namespace binding
}  // namespace ernie5
