// Threads for the CPU kernels: one loop, shared with the OpenMP team that Paddle's matrix products already use.
//
// Paddle's wheel carries libiomp5. A second runtime beside it would leave its idle workers spinning on the cores ours
// need, so the team of libiomp5 is borrowed at run time; without that library (a plain harness, a sanitizer run) the
// same loop runs on std::thread.
#pragma once

#include <cstdint>

namespace ernie5 {

// Threads that parallel_for uses: what set_num_threads fixed, else what Paddle's OpenMP team has, else every core.
int num_threads();

// To be called inside on_threads(asked, ...): the threads that really stand in it. The runtime may grant fewer than were
// asked for, and a barrier that waits for the missing ones would wait for ever.
int granted_threads(int asked);

// Fixes the number of threads; 0 follows Paddle's setting again.
void set_num_threads(int count);

namespace detail {
void run_parallel(int threads, void (*body)(void*, int), void* context);
}

// Calls body(thread) once on each of `threads` threads, 0 .. threads-1, and waits. A call from inside a body runs
// body(0) on the caller only.
template <class Body>
void on_threads(int threads, Body&& body) {
  detail::run_parallel(
      threads, [](void* context, int thread) { (*static_cast<Body*>(context))(thread); }, &body);
}

// Calls body(task, thread) for every task in [0, tasks), in order of task number as threads become free; thread is in
// [0, num_threads()). Tasks should be worth some microseconds each.
template <class Body>
void parallel_for(int64_t tasks, Body&& body) {
  int threads = num_threads();
  if (threads > tasks) threads = static_cast<int>(tasks);
  if (threads <= 1) {
    for (int64_t task = 0; task < tasks; ++task) body(task, 0);
    return;
  }
  alignas(64) int64_t next = 0;
  on_threads(threads, [&](int thread) {
    for (;;) {
      int64_t task = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
      if (task >= tasks) return;
      body(task, thread);
    }
  });
}

// Splits [0, count) into one contiguous piece a thread and calls body(begin, end, thread); pieces hold at least
// `grain` items, and their borders are multiples of `align`.
template <class Body>
void parallel_range(int64_t count, int64_t grain, int64_t align, Body&& body) {
  int64_t pieces = grain > 0 ? count / grain : count;
  int threads = num_threads();
  if (pieces < threads) threads = static_cast<int>(pieces);
  if (threads <= 1) {
    if (count > 0) body(int64_t{0}, count, 0);
    return;
  }
  int64_t each = (count + threads - 1) / threads;
  each = (each + align - 1) / align * align;
  on_threads(threads, [&](int thread) {
    int64_t begin = thread * each, end = begin + each < count ? begin + each : count;
    if (begin < end) body(begin, end, thread);
  });
}

}  // namespace ernie5
