#include "adamw/adamw.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "common/parallel.h"
#include "common/simd.h"

namespace ernie5 {
namespace {

constexpr int64_t kTaskElements = 16384;

// Many tensors as one row of elements, cut into tasks of about kTaskElements wherever the tensors begin and end.
// Borders inside a tensor are multiples of 16 from its start, and depend on the sizes only.
class Tasks {
 public:
  Tasks(int64_t tensors, const int64_t* sizes) : tensors_(tensors), sizes_(sizes) {
    int64_t room = 0;
    for (int64_t tensor = 0; tensor < tensors; ++tensor) {
      for (int64_t at = 0; at < sizes[tensor];) {
        if (room == 0) {
          starts_.push_back({tensor, at});
          room = kTaskElements;
        }
        int64_t taken = std::min(room, sizes[tensor] - at);
        at += taken;
        room = std::max<int64_t>(0, room - (taken + 15) / 16 * 16);
      }
    }
  }

  int64_t count() const { return static_cast<int64_t>(starts_.size()); }

  // Calls body(tensor, begin, end) for the pieces of one task.
  template <class Body>
  void pieces(int64_t task, Body&& body) const {
    Place place = starts_[static_cast<size_t>(task)];
    Place stop = task + 1 < count() ? starts_[static_cast<size_t>(task) + 1] : Place{tensors_, 0};
    for (; place.tensor < stop.tensor; place = {place.tensor + 1, 0}) {
      if (place.at < sizes_[place.tensor]) body(place.tensor, place.at, sizes_[place.tensor]);
    }
    if (place.tensor < tensors_ && place.at < stop.at) body(place.tensor, place.at, stop.at);
  }

 private:
  struct Place {
    int64_t tensor, at;
  };
  int64_t tensors_;
  const int64_t* sizes_;
  std::vector<Place> starts_;
};

// The numbers of one tensor's update.
struct Rates {
  float keep;     // what decay leaves of the parameter
  float step;     // rate, corrected for the moments' bias
  float epsilon;  // so corrected
};

Rates rates_of(float rate, float decay, float first_power, float second_power, float epsilon) {
  float correction = std::sqrt(1.0f - second_power);
  return {1.0f - rate * decay, rate * (correction / (1.0f - first_power)), epsilon * correction};
}

struct Betas {
  float first, second, gradient_factor;
};

template <class G>
void update(float* parameter, float* first, float* second, const G* gradient, bf16* copy, int64_t count, Betas betas,
            Rates rates) {
  each16(count, [=](int64_t i, int some) __attribute__((always_inline)) {
    f32x16 g = load_some(gradient + i, some) * betas.gradient_factor;
    f32x16 m = load_some(first + i, some) * betas.first + g * (1.0f - betas.first);
    f32x16 v = load_some(second + i, some) * betas.second + g * g * (1.0f - betas.second);
    f32x16 p = load_some(parameter + i, some) * rates.keep;
    p = p - rates.step * (m / (sqrt(v) + rates.epsilon));
    store_some(first + i, m, some);
    store_some(second + i, v, some);
    store_some(parameter + i, p, some);
    if (copy != nullptr) store_some(copy + i, p, some);
  });
}

template <class G>
void step(int64_t tensors, const int64_t* sizes, float* const* parameters, float* const* first, float* const* second,
          const G* const* gradients, bf16* const* copies, const float* rates, const float* decays,
          const float* first_powers, const float* second_powers, Betas betas, float epsilon) {
  const Tasks tasks(tensors, sizes);
  parallel_for(tasks.count(), [&](int64_t task, int) {
    tasks.pieces(task, [&](int64_t t, int64_t begin, int64_t end) {
      bf16* copy = copies != nullptr && copies[t] != nullptr ? copies[t] + begin : nullptr;
      update(parameters[t] + begin, first[t] + begin, second[t] + begin, gradients[t] + begin, copy, end - begin,
             betas, rates_of(rates[t], decays[t], first_powers[t], second_powers[t], epsilon));
    });
  });
}

template <class T>
double squares(const T* values, int64_t count) {
  f32x16 totals[4] = {};
  int64_t i = 0;
  for (; i + 64 <= count; i += 64) {
    for (int k = 0; k < 4; ++k) {
      f32x16 value = load(values + i + 16 * k);
      totals[k] += value * value;
    }
  }
  each16(count - i, [&](int64_t at, int some) __attribute__((always_inline)) {
    f32x16 value = load_some(values + i + at, some);
    totals[0] += value * value;
  });
  return sum((totals[0] + totals[1]) + (totals[2] + totals[3]));
}

template <class T>
double sum_of_squares(int64_t tensors, const int64_t* sizes, const T* const* values) {
  const Tasks tasks(tensors, sizes);
  std::vector<double> partial(static_cast<size_t>(tasks.count()), 0.0);
  parallel_for(tasks.count(), [&](int64_t task, int) {
    tasks.pieces(task, [&](int64_t t, int64_t begin, int64_t end) {
      partial[static_cast<size_t>(task)] += squares(values[t] + begin, end - begin);
    });
  });
  double total = 0.0;
  for (double part : partial) total += part;
  return total;
}

}  // namespace
}  // namespace ernie5

extern "C" {

void ernie5_adamw_forward_cpu_f32(int64_t tensors, const int64_t* sizes, float* const* parameters,
                                  float* const* first, float* const* second, const float* const* gradients,
                                  uint16_t* const* copies, const float* rates, const float* decays,
                                  const float* first_powers, const float* second_powers, float beta1, float beta2,
                                  float epsilon, float gradient_factor) {
  ernie5::step(tensors, sizes, parameters, first, second, gradients, reinterpret_cast<ernie5::bf16* const*>(copies),
               rates, decays, first_powers, second_powers, {beta1, beta2, gradient_factor}, epsilon);
}

void ernie5_adamw_forward_cpu_bf16(int64_t tensors, const int64_t* sizes, float* const* parameters,
                                   float* const* first, float* const* second, const uint16_t* const* gradients,
                                   uint16_t* const* copies, const float* rates, const float* decays,
                                   const float* first_powers, const float* second_powers, float beta1, float beta2,
                                   float epsilon, float gradient_factor) {
  ernie5::step(tensors, sizes, parameters, first, second, reinterpret_cast<const ernie5::bf16* const*>(gradients),
               reinterpret_cast<ernie5::bf16* const*>(copies), rates, decays, first_powers, second_powers,
               {beta1, beta2, gradient_factor}, epsilon);
}

void ernie5_sum_of_squares_forward_cpu_f32(int64_t tensors, const int64_t* sizes, const float* const* values,
                                           double* total) {
  *total = ernie5::sum_of_squares(tensors, sizes, values);
}

void ernie5_sum_of_squares_forward_cpu_bf16(int64_t tensors, const int64_t* sizes, const uint16_t* const* values,
                                            double* total) {
  *total = ernie5::sum_of_squares(tensors, sizes, reinterpret_cast<const ernie5::bf16* const*>(values));
}

}  // extern "C"
