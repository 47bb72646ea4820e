// Rows to and from the other ranks of a group, moved by threads of the group while the caller computes.
//
// A Channel has threads that send and threads that receive, so that a full-duplex link is used both ways. Each kind
// takes the pieces of all exchanges in the order they were started and listed. When every rank starts the same
// exchanges, and lists at step s what goes to rank + s and what comes from rank - s, the oldest piece that has not
// arrived anywhere is always in hand on both its sides: no rank waits for one that waits for it. A receiving thread
// tells its peer that there is room. The word must not queue behind rows going the same way, or the link would be used
// one way after the other: many threads receive, and a piece is sent only when they are at what its exchange receives.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

namespace ernie5 {

// Bytes for one peer, or room for what comes from it.
struct Piece {
  void* data;
  int64_t bytes;
  int peer;
};

// Moves one piece and returns when its memory is free (sent) or filled (received). Throws std::exception.
using Move = std::function<void(const Piece& piece, uint32_t tag)>;

// One exchange under way. Times are nanoseconds of the monotonic clock; 0: nothing was to be done.
class Exchange {
 public:
  struct Times {
    int64_t started = 0, send_began = 0, sent = 0, receive_began = 0, received = 0;
  };

  // Blocks until everything is sent and received. Returns why it failed; empty: it did not.
  std::string wait();
  Times times() const { return times_; }  // of a finished exchange

 private:
  friend class Channel;

  void receiving();
  void wait_for_receivers(int64_t count);
  void finished(bool sending, int64_t began, const std::string& error);

  std::shared_ptr<void> keep_;  // owns the memory of the pieces
  uint32_t tag_ = 0;
  Times times_;
  std::mutex mutex_;
  std::condition_variable changed_;
  int64_t unfinished_ = 0, receiving_ = 0;  // pieces: not yet moved; to receive, already in a thread's hands
  std::string error_;
};

// Lives until the process ends: its threads may be inside a call to a peer that will not answer.
class Channel {
 public:
  Channel(Move send, Move receive);

  // As many sends as receives, by step; empty pieces are skipped, on both sides alike. `keep` is held until the end.
  std::shared_ptr<Exchange> start(const std::vector<Piece>& sends, const std::vector<Piece>& receives,
                                  std::shared_ptr<void> keep);

 private:
  struct Job {
    std::shared_ptr<Exchange> exchange;
    Piece piece;
    int64_t receivers;  // how many of the exchange's pieces must be in receiving threads' hands before this is sent
  };
  struct Direction {
    Move move;
    bool sending;
    std::mutex mutex;
    std::condition_variable filled;
    std::deque<Job> queue;
    std::string broken;  // why an earlier piece failed; then the others fail too
  };

  static void run(Direction& direction);
  static void put(Direction& direction, const std::vector<Job>& jobs);

  Direction send_, receive_;
  uint32_t count_ = 0;
};

// Nanoseconds of the monotonic clock, that of Python's time.monotonic_ns().
int64_t now_ns();

}  // namespace ernie5
