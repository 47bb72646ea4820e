// Of tests/parallel/test_exchange.py: a piece is sent only once all that its exchange receives is in a thread's hands.
#include <atomic>
#include <chrono>
#include <cstdio>
#include <thread>

#include "exchange/exchange.h"

int main() {
  using ernie5::Piece;
  std::atomic<bool> open{false};
  std::atomic<int> sent{0}, received{0};
  char byte = 0;
  auto pause = [](int milliseconds) { std::this_thread::sleep_for(std::chrono::milliseconds(milliseconds)); };
  auto* channel = new ernie5::Channel([&](const Piece&, uint32_t) { ++sent; },
                                      [&](const Piece&, uint32_t) {
                                        while (!open) pause(1);
                                        ++received;
                                      });
  const Piece full{&byte, 1, 1}, empty{&byte, 0, 1};
  const int many = 40;  // more than there are receiving threads
  auto first = channel->start(std::vector<Piece>(many, empty), std::vector<Piece>(many, full), nullptr);
  auto second = channel->start({full}, {full}, nullptr);
  auto third = channel->start({full, full}, {empty, empty}, nullptr);
  pause(100);
  const int early = sent;
  open = true;
  for (auto* exchange : {&first, &second, &third}) {
    if (!(*exchange)->wait().empty()) return 1;
  }
  std::printf("sent %d before and %d after, received %d\n", early, sent.load(), received.load());
  return 0;
}
