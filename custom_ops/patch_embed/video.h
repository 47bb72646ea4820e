// Where the patches of a video lie, and what is read of them. Names and shapes as in patch_embed.h.
#pragma once

#include <vector>

#include "common/gemm.h"

namespace ernie5 {
namespace patch_embed {

constexpr int64_t kRunSlack = 16;  // vectors may reach beyond the end of a run by that much

// Slots of `scratch`: what the calling thread makes and all read, and what belongs to a thread.
enum { kStripsSlot = 120, kVectorsSlot, kGradSlot, kSumsSlot, kPanelSlot, kRowSlot, kResultSlot };

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

inline f32x16 load(const uint8_t* p) {
#ifdef __AVX512F__  // GCC converts bytes in many steps
  __m512i wide = _mm512_maskz_cvtepu8_epi32(0xffff, _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return __builtin_convertvector(reinterpret_cast<i32x16>(wide), f32x16);
#else
  typedef uint8_t u8x16 __attribute__((vector_size(16), aligned(1), may_alias));
  u16x16 wide = __builtin_convertvector(*reinterpret_cast<const u8x16*>(p), u16x16);
  return __builtin_convertvector(__builtin_convertvector(wide, i32x16), f32x16);
#endif
}
using ernie5::load;

struct Sizes {
  int64_t B, T, H, W, C, pt, ph, pw, lead, D;
  int64_t run = pw * C;         // neighbouring values of a patch in one row of pixels
  int64_t runs = pt * ph;       // of them in a patch
  int64_t K = runs * run;       // values of a patch
  int64_t times = T > 0 ? divide_up(lead + T, pt) : 0;
  int64_t down = H / ph, across = W / pw;
  int64_t line = W * C;         // values of a row of pixels
  int64_t values() const { return B * T * H * line; }
  int64_t tokens() const { return B * times * down * across; }
};

// Patch times begin .. end-1, whose patches have the same frames: those that `first_run` .. `last_run`-1 lie in.
struct Span {
  int64_t begin, end, first_run, last_run;
  int64_t tokens;
  int64_t depth(const Sizes& s) const { return (last_run - first_run) * s.run; }
};

// At most three: patches that lack frames before the clip, whole ones, those that lack frames behind it.
std::vector<Span> make_spans(const Sizes& s) {
  std::vector<Span> spans;
  for (int64_t time = 0; time < s.times; ++time) {
    int64_t start = time * s.pt - s.lead;
    int64_t first_run = larger(-start, 0) * s.ph, last_run = smaller(s.T - start, s.pt) * s.ph;
    if (spans.empty() || spans.back().first_run != first_run || spans.back().last_run != last_run) {
      spans.push_back({time, time, first_run, last_run, 0});
    }
    spans.back().end = time + 1;
    spans.back().tokens += s.B * s.down * s.across;
  }
  return spans;
}

// Walks over the tokens of a span in the order clip, time, row, column.
class Cursor {
 public:
  Cursor(const Sizes& s, const Span& span, int64_t number) : s_(s), span_(span) {
    column_ = number % s.across, number /= s.across;
    row_ = number % s.down, number /= s.down;
    time_ = span.begin + number % (span.end - span.begin);
    clip_ = number / (span.end - span.begin);
  }
  int64_t token() const { return ((clip_ * s_.times + time_) * s_.down + row_) * s_.across + column_; }
  // Of the first value of the patch; outside the video if that frame is missing.
  int64_t value() const {
    int64_t frame = clip_ * s_.T + time_ * s_.pt - s_.lead;
    return (frame * s_.H + row_ * s_.ph) * s_.line + column_ * s_.run;
  }
  // Tokens from here to the end of the row.
  int64_t row_left() const { return s_.across - column_; }
  // Goes on by up to that many.
  void next(int64_t count = 1) {
    column_ += count;
    if (column_ < s_.across) return;
    column_ = 0;
    if (++row_ < s_.down) return;
    row_ = 0;
    if (++time_ < span_.end) return;
    time_ = span_.begin;
    ++clip_;
  }

 private:
  const Sizes& s_;
  const Span& span_;
  int64_t column_, row_, time_, clip_;
};

// Reads the runs of a patch as normalised floats: v * scale + shift, with one factor and one summand a value of a run.
template <class Video>
class Patches {
 public:
  Patches(const Sizes& s, const Video* video, const float* mean, const float* deviation)
      : s_(s), video_(video), whole_(s.values() - larger(round_up(s.run, 16), 16)) {
    scale_ = scratch<float, kVectorsSlot>(2 * (s.run + kRunSlack));
    shift_ = scale_ + s.run + kRunSlack;
    double unit = sizeof(Video) == 1 ? 255.0 : 1.0;
    for (int64_t i = 0; i < s.run + kRunSlack && s.C > 0; ++i) {
      double spread = deviation[i % s.C];
      scale_[i] = static_cast<float>(1.0 / (unit * spread));
      shift_[i] = static_cast<float>(-mean[i % s.C] / spread);
    }
  }

  // Runs begin .. end-1 of the patch whose first value is number `value`; may write kRunSlack floats more.
  void read(int64_t value, int64_t begin, int64_t end, float* to) const {
    const int64_t length = s_.run, rows = s_.ph, line = s_.line, next_frame = (s_.H - s_.ph) * s_.line;
    const float *scale = scale_, *shift = shift_;
    int64_t row = begin, from = value;
    for (; row >= rows; row -= rows) from += s_.H * line;
    from += row * line;
    const f32x16 first_scale = load(scale), first_shift = load(shift);
    for (int64_t run = begin; run < end; ++run, to += length) {
      const Video* values = video_ + from;
      if (from <= whole_) {
        store(to, load(values) * first_scale + first_shift);
        for (int64_t i = 16; i < length; i += 16) store(to + i, load(values + i) * load(scale + i) + load(shift + i));
      } else {  // a vector would reach beyond the end of the video
        for (int64_t i = 0; i < length; ++i) to[i] = static_cast<float>(values[i]) * scale[i] + shift[i];
      }
      from += line;
      if (++row == rows) row = 0, from += next_frame;
    }
  }

 private:
  const Sizes& s_;
  const Video* video_;
  int64_t whole_;  // the last start of a run that can be read in whole vectors
  float *scale_, *shift_;
};

}  // namespace patch_embed
}  // namespace ernie5
