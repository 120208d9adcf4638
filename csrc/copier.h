#pragma once

#include <atomic>
#include <deque>
#include <memory>
#include <vector>

#include "doorbell.h"
#include "monitor.h"
#include "read_state.h"
#include "scheduler.h"
#include "slab_pool.h"
#include "spill_file.h"
#include "thread_group.h"
#include "write_queue.h"

namespace ssdtrain {

// A part of a read whose bytes are still in memory.
struct ForwardJob {
  std::shared_ptr<ReadState> read;
  std::shared_ptr<const char> bytes;  // keeps the slab leased
  size_t bytes_offset;
  char* destination;
  size_t nbytes;
  uint64_t file_offset;  // for the error, if the engine closes first
};

// The threads that move bytes in memory: from slabs to readers first, then from sources to slabs,
// which they hand to the scheduler. They sleep when there is no job or no free slab.
class Copier {
 public:
  Copier(std::shared_ptr<Monitor> monitor, std::shared_ptr<SlabPool> pool,
         std::shared_ptr<Doorbell> doorbell, Scheduler* scheduler, bool has_checksum);
  ~Copier();

  void start(size_t num_threads);
  // monitor->mutex held; the doorbell must be rung once it is released.
  void enqueue(ForwardJob job) { forwards_.push_back(std::move(job)); }
  void enqueue(std::shared_ptr<WriteState> write, WriteTarget target) {
    writes_.push(std::move(write), std::move(target));
  }
  // monitor->mutex held: gives up what has not begun.
  void cancel_queued();
  void stop();

 private:
  void run();
  bool run_one();
  bool take_forward(ForwardJob* job);
  void forward(ForwardJob job);
  void copy(WriteQueue::Job job);

  const std::shared_ptr<Monitor> monitor_;
  const std::shared_ptr<Doorbell> doorbell_;
  const bool has_checksum_;
  std::deque<ForwardJob> forwards_;
  WriteQueue writes_;
  std::atomic<bool> is_stopping_{false};
  ThreadGroup threads_;
};

}  // namespace ssdtrain
