#pragma once

#include <functional>
#include <thread>
#include <vector>

namespace ssdtrain {

// Threads of the engine: named, and with all signals blocked so that Python's handlers run on
// Python's threads. The owner tells them to stop, then joins.
class ThreadGroup {
 public:
  ThreadGroup() = default;
  ThreadGroup(ThreadGroup&&) noexcept = default;
  ~ThreadGroup() { join(); }

  void spawn(const char* name, std::function<void()> body);
  void join();

 private:
  std::vector<std::thread> threads_;
};

}  // namespace ssdtrain
