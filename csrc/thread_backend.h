#pragma once

#include <condition_variable>
#include <deque>
#include <mutex>

#include "io_backend.h"
#include "thread_group.h"

namespace ssdtrain {

// Plain pread and pwrite on a few threads: works everywhere.
class ThreadBackend : public IoBackend {
 public:
  ThreadBackend(size_t num_threads, OnComplete on_complete);
  ~ThreadBackend() override;

  const char* kind() const override { return "threads"; }
  size_t depth() const override { return num_threads_; }
  void submit(const IoOp& op) override;
  void stop() override;

 private:
  void run();

  const size_t num_threads_;
  const OnComplete on_complete_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<IoOp> queue_;
  bool is_stopping_ = false;
  ThreadGroup threads_;
};

}  // namespace ssdtrain
