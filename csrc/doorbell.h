#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>

namespace ssdtrain {

// Lets threads sleep until "something may have changed", without tying the change to one mutex.
//
// A sleeper reads epoch(), looks for work, and when there is none calls wait() with that epoch; a
// ring in between is never lost. Its mutex is a leaf: ring() may be called under any other lock.
class Doorbell {
 public:
  uint64_t epoch() const { return epoch_.load(std::memory_order_acquire); }

  void ring_one() {
    advance();
    rung_.notify_one();
  }
  void ring_all() {
    advance();
    rung_.notify_all();
  }

  void wait(uint64_t seen) {
    std::unique_lock<std::mutex> lock(mutex_);
    rung_.wait(lock, [&] { return epoch() != seen; });
  }

 private:
  void advance() {
    std::lock_guard<std::mutex> lock(mutex_);
    epoch_.fetch_add(1, std::memory_order_release);
  }

  std::mutex mutex_;
  std::condition_variable rung_;
  std::atomic<uint64_t> epoch_{0};
};

}  // namespace ssdtrain
