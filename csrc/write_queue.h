#pragma once

#include <deque>
#include <memory>
#include <optional>

#include "monitor.h"
#include "pinned_region.h"
#include "scheduler.h"
#include "slab_pool.h"
#include "spill_file.h"
#include "write_state.h"

namespace ssdtrain {

// Where the bytes of a write go: a file, by way of slabs, or host memory for good.
struct WriteTarget {
  std::shared_ptr<const OpenFile> file;
  std::shared_ptr<PinnedRegion> host;
};

// Writes whose chunks wait to be copied, the oldest first, and what becomes of a chunk before and
// after its copy. The copy itself is its owner's: a memcpy, or a copy on a device's stream.
class WriteQueue {
 public:
  // One chunk and the memory it is copied to.
  struct Job {
    std::shared_ptr<WriteState> write;
    WriteTarget target;
    size_t chunk = 0;
    std::shared_ptr<char> bytes;
  };

  WriteQueue(std::shared_ptr<Monitor> monitor, std::shared_ptr<SlabPool> pool,
             Scheduler* scheduler)
      : monitor_(std::move(monitor)), pool_(std::move(pool)), scheduler_(scheduler) {}

  // monitor->mutex held.
  void push(std::shared_ptr<WriteState> write, WriteTarget target) {
    writes_.push_back({std::move(write), std::move(target), 0, nullptr});
  }
  // monitor->mutex held: nothing when no chunk waits, or none has memory to go to.
  std::optional<Job> take();
  // monitor->mutex held: gives up what has not begun.
  void cancel_all();

  // monitor->mutex not held: the chunk is copied, on to its file.
  void finish(Job job);
  // monitor->mutex not held: its source could not be read.
  void fail(Job job, int errnum);

  // No more chunks come; lets the slabs go.
  void stop() { pool_.reset(); }

 private:
  std::shared_ptr<char> memory_for(const Job& front, size_t chunk);

  const std::shared_ptr<Monitor> monitor_;
  std::shared_ptr<SlabPool> pool_;  // null once stopped
  Scheduler* const scheduler_;
  std::deque<Job> writes_;
};

}  // namespace ssdtrain
