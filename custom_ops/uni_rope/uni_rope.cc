#include "uni_rope/uni_rope.h"

#include <cstdint>
#include <cstring>

#include "common/parallel.h"
#include "common/simd.h"

namespace ernie5 {
namespace uni_rope {
namespace {

constexpr int64_t kGrain = 32;  // positions a thread takes at least
constexpr int64_t kLanes = 16;
constexpr int64_t kMostDims = 512;  // wider heads are turned in pieces of as many dims

// cos and +-sin of `dims` dims of one position, one value a dim: out[i] = x[i] * cos[i] + x[i ^ 1] * sin[i].
struct Turn {
  float cos[kMostDims], sin[kMostDims];

  Turn(const float* cosines, const float* sines, int64_t dims, float sign) {
    for (int64_t pair = 0; pair < dims / 2; ++pair) {
      cos[2 * pair] = cos[2 * pair + 1] = cosines[pair];
      sin[2 * pair] = -sign * sines[pair];
      sin[2 * pair + 1] = sign * sines[pair];
    }
  }

  template <class T>
  void apply(const T* from, int64_t dims, T* to) const {
    const i32x16 swapped = {1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14};
    int64_t i = 0;
    for (; i + kLanes <= dims; i += kLanes) {
      f32x16 x = load(from + i);
      store(to + i, x * load(cos + i) + __builtin_shuffle(x, swapped) * load(sin + i));
    }
    if (i == dims) return;
    f32x16 x = load_part(from + i, dims - i);
    f32x16 turned = x * load_part(cos + i, dims - i) + __builtin_shuffle(x, swapped) * load_part(sin + i, dims - i);
    store_part(to + i, turned, dims - i);
  }
};

template <class T>
void rotate(const T* q, const T* k, const float* cos, const float* sin, int64_t positions, int64_t heads,
            int64_t groups, int64_t head_dim, float sign, T* q_out, T* k_out) {
  parallel_range(positions, kGrain, 1, [&](int64_t begin, int64_t end, int) {
    for (int64_t position = begin; position < end; ++position) {
      for (int64_t first = 0; first < head_dim; first += kMostDims) {
        int64_t dims = head_dim - first < kMostDims ? head_dim - first : kMostDims;
        int64_t table = (position * head_dim + first) / 2;
        Turn turn(cos + table, sin + table, dims, sign);
        for (int64_t head = 0; head < heads; ++head) {
          int64_t at = (position * heads + head) * head_dim + first;
          turn.apply(q + at, dims, q_out + at);
        }
        for (int64_t head = 0; head < groups; ++head) {
          int64_t at = (position * groups + head) * head_dim + first;
          turn.apply(k + at, dims, k_out + at);
        }
      }
    }
  });
}

const bf16* halves(const uint16_t* p) { return reinterpret_cast<const bf16*>(p); }
bf16* halves(uint16_t* p) { return reinterpret_cast<bf16*>(p); }

}  // namespace
}  // namespace uni_rope
}  // namespace ernie5

using ernie5::uni_rope::halves;

extern "C" void ernie5_uni_rope_cpu_f32(const float* q, const float* k, const float* cos, const float* sin,
                                        int64_t positions, int64_t heads, int64_t groups, int64_t head_dim, float sign,
                                        float* q_out, float* k_out) {
  ernie5::uni_rope::rotate(q, k, cos, sin, positions, heads, groups, head_dim, sign, q_out, k_out);
}

extern "C" void ernie5_uni_rope_cpu_bf16(const uint16_t* q, const uint16_t* k, const float* cos, const float* sin,
                                         int64_t positions, int64_t heads, int64_t groups, int64_t head_dim,
                                         float sign, uint16_t* q_out, uint16_t* k_out) {
  ernie5::uni_rope::rotate(halves(q), halves(k), cos, sin, positions, heads, groups, head_dim, sign, halves(q_out),
                           halves(k_out));
}
