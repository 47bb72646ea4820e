#include "elementwise/elementwise.h"

#include "common/parallel.h"

namespace ernie5 {
namespace {

constexpr int64_t kGrain = 1 << 14;  // values worth a thread

// body(first, lanes) for every 16 values, the last of them fewer.
template <class Body>
void every16(int64_t size, Body&& body) {
  parallel_range(size, kGrain, 16, [&](int64_t begin, int64_t end, int) {
    each16(end - begin, [&](int64_t at, int some) __attribute__((always_inline)) { body(begin + at, some); });
  });
}

template <class T>
void add_up(const T* const* tensors, int64_t count, int64_t size, T* out) {
  every16(size, [=](int64_t at, int some) __attribute__((always_inline)) {
    f32x16 total = count > 0 ? load_some(tensors[0] + at, some) : f32x16{};
    for (int64_t i = 1; i < count; ++i) total += load_some(tensors[i] + at, some);
    store_some(out + at, total, some);
  });
}

template <class From, class To>
void convert(const From* in, int64_t size, To* out) {
  every16(size, [=](int64_t at, int some) __attribute__((always_inline)) {
    store_some(out + at, load_some(in + at, some), some);
  });
}

}  // namespace
}  // namespace ernie5

extern "C" {

void ernie5_sum_forward_cpu_f32(const float* const* tensors, int64_t count, int64_t size, float* out) {
  ernie5::add_up(tensors, count, size, out);
}

void ernie5_sum_forward_cpu_bf16(const ernie5::bf16* const* tensors, int64_t count, int64_t size, ernie5::bf16* out) {
  ernie5::add_up(tensors, count, size, out);
}

void ernie5_widen_forward_cpu(const ernie5::bf16* in, int64_t size, float* out) { ernie5::convert(in, size, out); }

void ernie5_narrow_forward_cpu(const float* in, int64_t size, ernie5::bf16* out) { ernie5::convert(in, size, out); }

}  // extern "C"
