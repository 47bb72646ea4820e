// A thread that keeps a core from falling asleep while the process waits for a message.
//
// A core with nothing to do halts; on a virtual machine the host takes it back. When the message comes, waking takes up
// to a millisecond, and what follows runs on cold caches at a low clock. A thread of the lowest scheduling class takes
// the time that no other thread of the process wants.
#include <sched.h>

#include <atomic>
#include <system_error>
#include <thread>

namespace {

std::atomic<int> wanted{0};  // the number of the thread that shall run; 0: none
std::atomic<int> started{0};

void stay_awake([[maybe_unused]] int number) {
#if defined(__linux__)
  const sched_param lowest{};
  if (sched_setscheduler(0, SCHED_IDLE, &lowest) != 0) return;  // of this thread alone
  while (wanted.load(std::memory_order_relaxed) == number) {
#if defined(__x86_64__)
    for (int i = 0; i < 1000; ++i) __builtin_ia32_pause();
#endif
  }
#endif
}

}  // namespace

// On: a thread of this process stays awake, one however often it is asked for. Off: it ends.
extern "C" __attribute__((visibility("default"))) void ernie5_keep_awake(int on) {
  if (!on) {
    wanted.store(0);
  } else if (wanted.load() == 0) {
    const int number = started.fetch_add(1) + 1;
    wanted.store(number);
    try {
      std::thread(stay_awake, number).detach();
    } catch (const std::system_error&) {  // no thread to be had: the core may sleep
      wanted.store(0);
    }
  }
}
