#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
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
  BusyClock write_clock;
  BusyClock read_clock;

  std::atomic<uint64_t> inflight_nbytes{0};
  std::atomic<uint64_t> num_events{0};
  std::atomic<uint64_t> written_nbytes{0};
  std::atomic<uint64_t> read_nbytes{0};
  std::atomic<uint64_t> num_retries{0};
  std::atomic<uint64_t> num_write_errors{0};
  std::atomic<uint64_t> num_read_errors{0};
  std::atomic<uint64_t> rescued_nbytes{0};
};

}  // namespace ssdtrain
