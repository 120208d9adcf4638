#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <mutex>

namespace ssdtrain {

// The clock of all moments that are reported: what Python calls time.monotonic() on Linux.
inline double seconds_now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Seconds during which at least one of something was going on. Not thread-safe.
class BusyClock {
 public:
  void begin() {
    if (num_active_++ == 0) started_ = Clock::now();
  }
  void end() {
    if (--num_active_ == 0) seconds_ += since_start();
  }
  double seconds() const { return seconds_ + (num_active_ > 0 ? since_start() : 0.0); }

 private:
  using Clock = std::chrono::steady_clock;
  double since_start() const {
    return std::chrono::duration<double>(Clock::now() - started_).count();
  }

  int num_active_ = 0;
  double seconds_ = 0.0;
  Clock::time_point started_;
};

// What one direction of the drive has done.
struct Direction {
  BusyClock clock;
  uint64_t nbytes = 0;
};

// What the drive has done for the files of one user of an engine.
struct Traffic {
  Direction written;
  Direction read;
};

constexpr size_t kMaxUsers = 2;

// What an engine shares with its requests, which may outlive it: one lock and the counters.
//
// [Note: locking] One mutex guards all request and queue state. It is held for bookkeeping only:
// never while bytes move, a system call runs or a backend is called. Locks taken under it are
// leaves (slab pool, doorbell). The atomics are written under it or are plain counters, and may be
// read without it.
struct Monitor {
  std::mutex mutex;
  std::condition_variable progress;  // inflight_nbytes or num_pending fell
  bool is_closing = false;
  uint64_t num_pending = 0;  // requests accepted and not done
  uint64_t num_awaited = 0;  // reads not done that somebody waits for
  BusyClock write_clock;
  BusyClock read_clock;
  std::array<Traffic, kMaxUsers> traffic;  // by SpillFile::user()

  std::atomic<uint64_t> inflight_nbytes{0};
  std::atomic<uint64_t> num_events{0};
  std::atomic<uint64_t> written_nbytes{0};
  std::atomic<uint64_t> read_nbytes{0};
  std::atomic<uint64_t> num_retries{0};
  std::atomic<uint64_t> num_write_errors{0};
  std::atomic<uint64_t> num_read_errors{0};
  std::atomic<uint64_t> rescued_nbytes{0};
};

// Of the reads in `queue`, the one to serve next: the first that somebody waits for, else the
// first. The mutex is held, the queue is not empty.
template <typename Queue, typename IsAwaited>
typename Queue::iterator first_awaited(Queue& queue, const Monitor& monitor, IsAwaited is_awaited) {
  if (monitor.num_awaited == 0) return queue.begin();
  auto found = std::find_if(queue.begin(), queue.end(), is_awaited);
  return found == queue.end() ? queue.begin() : found;
}

}  // namespace ssdtrain
