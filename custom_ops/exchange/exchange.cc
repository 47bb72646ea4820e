#include "exchange/exchange.h"

#include <algorithm>
#include <chrono>
#include <ctime>
#include <exception>
#include <thread>
#include <utility>

namespace ernie5 {
namespace {

// Above what the group's own collectives count from zero, in the upper half of gloo's 32 bits; wraps around there.
constexpr uint32_t kFirstTag = 0x80000000u;
constexpr int kSenders = 2, kReceivers = 16;
// What a receiving thread needs, at most, from `Exchange::receiving` until its word is on the way: gloo does not tell.
// Long pieces let it pass; behind shorter ones it loses no more than that.
constexpr std::chrono::microseconds kWord{100};
constexpr int64_t kLong = 1 << 16;

}  // namespace

int64_t now_ns() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * int64_t{1000000000} + now.tv_nsec;
}

std::string Exchange::wait() {
  std::unique_lock<std::mutex> lock(mutex_);
  changed_.wait(lock, [this] { return unfinished_ == 0; });
  return error_;
}

void Exchange::receiving() {
  std::lock_guard<std::mutex> lock(mutex_);
  ++receiving_;
  changed_.notify_all();
}

void Exchange::wait_for_receivers(int64_t count) {
  std::unique_lock<std::mutex> lock(mutex_);
  changed_.wait(lock, [&] { return receiving_ >= count; });
}

void Exchange::finished(bool sending, int64_t began, const std::string& error) {
  std::lock_guard<std::mutex> lock(mutex_);
  int64_t& first = sending ? times_.send_began : times_.receive_began;
  if (first == 0 || began < first) first = began;
  (sending ? times_.sent : times_.received) = now_ns();
  if (error_.empty()) error_ = error;
  if (--unfinished_ > 0) return;
  keep_.reset();
  changed_.notify_all();
}

Channel::Channel(Move send, Move receive) {
  send_.move = std::move(send);
  send_.sending = true;
  receive_.move = std::move(receive);
  receive_.sending = false;
  for (int i = 0; i < kSenders; ++i) std::thread([this] { run(send_); }).detach();
  for (int i = 0; i < kReceivers; ++i) std::thread([this] { run(receive_); }).detach();
}

std::shared_ptr<Exchange> Channel::start(const std::vector<Piece>& sends, const std::vector<Piece>& receives,
                                         std::shared_ptr<void> keep) {
  auto exchange = std::make_shared<Exchange>();
  auto full = [](const Piece& piece) { return piece.bytes > 0; };
  const int64_t incoming = std::count_if(receives.begin(), receives.end(), full);
  exchange->unfinished_ = incoming + std::count_if(sends.begin(), sends.end(), full);
  if (exchange->unfinished_ > 0) exchange->keep_ = std::move(keep);
  exchange->tag_ = kFirstTag | count_++;
  exchange->times_.started = now_ns();
  std::vector<Job> in, out;
  for (size_t step = 0; step < sends.size(); ++step) {
    // No more receivers than there will be once all earlier steps, of all ranks, are done.
    const int64_t receivers = std::min(incoming, static_cast<int64_t>(in.size()) + kReceivers);
    if (full(sends[step])) out.push_back({exchange, sends[step], receivers});
    if (full(receives[step])) in.push_back({exchange, receives[step], 0});
  }
  put(receive_, in);
  put(send_, out);
  return exchange;
}

void Channel::put(Direction& direction, const std::vector<Job>& jobs) {
  std::lock_guard<std::mutex> lock(direction.mutex);
  for (const Job& job : jobs) {
    direction.queue.push_back(job);
    direction.filled.notify_one();
  }
}

void Channel::run(Direction& direction) {
  for (;;) {
    Job job;
    std::string error;
    {
      std::unique_lock<std::mutex> lock(direction.mutex);
      direction.filled.wait(lock, [&] { return !direction.queue.empty(); });
      job = std::move(direction.queue.front());
      direction.queue.pop_front();
      error = direction.broken;
    }
    if (direction.sending) {
      job.exchange->wait_for_receivers(job.receivers);
      if (job.receivers > 0 && job.piece.bytes > kLong) std::this_thread::sleep_for(kWord);
    } else {
      job.exchange->receiving();
    }
    const int64_t began = now_ns();
    if (error.empty()) {
      try {
        direction.move(job.piece, job.exchange->tag_);
      } catch (const std::exception& thrown) {
        error = std::string(direction.sending ? "sending to rank " : "receiving from rank ") +
                std::to_string(job.piece.peer) + " of the group: " + thrown.what();
        std::lock_guard<std::mutex> lock(direction.mutex);
        direction.broken = error;
      }
    }
    job.exchange->finished(direction.sending, began, error);
  }
}

}  // namespace ernie5
