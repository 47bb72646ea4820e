#include "common/parallel.h"

#include <dlfcn.h>

#include <thread>
#include <vector>

namespace ernie5 {
namespace {

// The part of libiomp5's own interface that is needed; its entry points are stable since 2013.
struct Team {
  using Fork = void (*)(void* location, int arguments, void (*micro)(int*, int*, ...), ...);
  using Push = void (*)(void* location, int thread, int threads);
  using Number = int (*)();
  using Global = int (*)(void* location);
  Fork fork = nullptr;
  Push push = nullptr;
  Number max_threads = nullptr;
  Number in_parallel = nullptr;
  Number region_threads = nullptr;
  Global global_thread = nullptr;

  Team() {
    void* library = dlopen("libiomp5.so", RTLD_NOW | RTLD_NOLOAD);
    if (library == nullptr) return;
    push = reinterpret_cast<Push>(dlsym(library, "__kmpc_push_num_threads"));
    max_threads = reinterpret_cast<Number>(dlsym(library, "omp_get_max_threads"));
    in_parallel = reinterpret_cast<Number>(dlsym(library, "omp_in_parallel"));
    region_threads = reinterpret_cast<Number>(dlsym(library, "omp_get_num_threads"));
    global_thread = reinterpret_cast<Global>(dlsym(library, "__kmpc_global_thread_num"));
    if (push != nullptr && max_threads != nullptr && in_parallel != nullptr && region_threads != nullptr &&
        global_thread != nullptr) {
      fork = reinterpret_cast<Fork>(dlsym(library, "__kmpc_fork_call"));
    }
  }
};

const Team& team() {
  static const Team found;
  return found;
}

// ident_t of libiomp5: flags say "called from compiled code", the text names no source.
struct Location {
  int32_t reserved1 = 0, flags = 2, reserved2 = 0, reserved3 = 0;
  const char* source = ";ernie5;ernie5;0;0;;";
};
Location location;

int fixed_threads = 0;
thread_local bool inside = false;

struct Call {
  void (*body)(void*, int);
  void* context;
};

void enter(int* /*global*/, int* bound, Call* call) {
  inside = true;
  call->body(call->context, *bound);
  inside = false;
}

}  // namespace

int num_threads() {
  if (inside) return 1;
  if (fixed_threads > 0) return fixed_threads;
  if (team().fork != nullptr) return team().in_parallel() ? 1 : team().max_threads();
  int cores = static_cast<int>(std::thread::hardware_concurrency());
  return cores > 0 ? cores : 1;
}

int granted_threads(int asked) { return asked > 1 && team().fork != nullptr ? team().region_threads() : asked; }

void set_num_threads(int count) { fixed_threads = count; }

void detail::run_parallel(int threads, void (*body)(void*, int), void* context) {
  if (threads <= 1 || inside) {
    body(context, 0);
    return;
  }
  if (team().fork != nullptr) {
    Call call{body, context};
    team().push(&location, team().global_thread(&location), threads);
    team().fork(&location, 1, reinterpret_cast<void (*)(int*, int*, ...)>(enter), &call);
    return;
  }
  std::vector<std::thread> workers;
  for (int thread = 1; thread < threads; ++thread) {
    workers.emplace_back([=] {
      inside = true;
      body(context, thread);
    });
  }
  inside = true;
  body(context, 0);
  inside = false;
  for (auto& worker : workers) worker.join();
}

}  // namespace ernie5

extern "C" void ernie5_set_num_threads(int count) { ernie5::set_num_threads(count); }
extern "C" int ernie5_num_threads() { return ernie5::num_threads(); }
