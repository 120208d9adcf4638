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

// A drive that was busy for so long without a pause shows how fast it is: what is shorter may be a
// burst that a cache or the credit of a rate limiter took. A pause is longer than what it takes to
// go on.
constexpr double kSustainedSeconds = 0.25;
constexpr double kPauseSeconds = 0.005;

// What one direction of the drive has done. Not thread-safe.
class Direction {
 public:
  // One more transfer is at the drive.
  void begin() {
    if (num_active_ == 0) start();
    ++num_active_;
  }
  // It is over and has moved so many bytes.
  void end(uint64_t nbytes) {
    nbytes_ += nbytes;
    period_nbytes_ += nbytes;
    if (--num_active_ > 0) return;
    ended_ = seconds_now();
    busy_seconds_ += ended_ - started_;
    period_seconds_ += ended_ - started_;
  }

  uint64_t nbytes() const { return nbytes_; }
  // With at least one transfer at the drive.
  double busy_seconds() const { return busy_seconds_ + running_seconds(); }
  // Of periods without a pause in which it was busy for at least kSustainedSeconds.
  uint64_t sustained_nbytes() const {
    return sustained_nbytes_ + (period_seconds() < kSustainedSeconds ? 0 : period_nbytes_);
  }
  double sustained_seconds() const {
    double seconds = period_seconds();
    return sustained_seconds_ + (seconds < kSustainedSeconds ? 0.0 : seconds);
  }

 private:
  void start() {
    started_ = seconds_now();
    if (started_ - ended_ <= kPauseSeconds) return;
    sustained_nbytes_ = sustained_nbytes();
    sustained_seconds_ = sustained_seconds();
    period_seconds_ = 0.0;
    period_nbytes_ = 0;
  }
  double running_seconds() const { return num_active_ > 0 ? seconds_now() - started_ : 0.0; }
  double period_seconds() const { return period_seconds_ + running_seconds(); }

  int num_active_ = 0;
  double started_ = 0.0;
  double ended_ = 0.0;
  double period_seconds_ = 0.0;
  uint64_t nbytes_ = 0;
  uint64_t period_nbytes_ = 0;
  double busy_seconds_ = 0.0;
  uint64_t sustained_nbytes_ = 0;
  double sustained_seconds_ = 0.0;
};

// What the drive has done for the files of one user of an engine.
struct Traffic {
  Direction written;
  Direction read;
};

// Copies between accelerators and host memory in one direction: their streams' busy time.
struct Copies {
  uint64_t nbytes = 0;
  double seconds = 0.0;

  void add(uint64_t more_nbytes, double more_seconds) {
    nbytes += more_nbytes;
    seconds += more_seconds;
  }
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
  Traffic total;
  std::array<Traffic, kMaxUsers> traffic;  // by SpillFile::user()
  Copies copied_out;
  Copies copied_in;

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
