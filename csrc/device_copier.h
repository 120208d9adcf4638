#pragma once

#include <atomic>
#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "device_driver.h"
#include "doorbell.h"
#include "monitor.h"
#include "read_state.h"
#include "read_transfer.h"
#include "scheduler.h"
#include "slab_pool.h"
#include "spill_file.h"
#include "thread_group.h"
#include "write_queue.h"

namespace ssdtrain {

// Calls back, on its own thread and in order, when fences of one stream are passed.
class FenceWatcher {
 public:
  // Gets what the driver threw, empty when all went well, and how long the stream took: since this
  // was queued, what it needs was there, and what was queued before was over, as far as was seen.
  using Done = std::function<void(const std::string& error, double seconds)>;

  ~FenceWatcher() { stop(); }
  void start(const char* name);
  // What is over at `fence` could begin after `needed`.
  void push(std::vector<std::shared_ptr<Fence>> needed, std::shared_ptr<Fence> fence, Done done);
  // Works off what was pushed, then ends the thread.
  void stop();

 private:
  struct Watched {
    std::vector<std::shared_ptr<Fence>> needed;
    std::shared_ptr<Fence> fence;
    Done done;
    double queued;
  };
  void run();
  static double wait_until_ready(const Watched& next);

  std::mutex mutex_;  // a leaf
  std::condition_variable changed_;
  std::deque<Watched> queue_;
  bool is_stopping_ = false;
  ThreadGroup thread_;
};

// One part of a read on its way into device memory, from host memory that holds it.
struct CopyIn {
  std::shared_ptr<ReadState> read;
  std::shared_ptr<const char> bytes;  // kept until the copy is over
  std::shared_ptr<Fence> available;   // `bytes` are there after this point; null: they are there
  size_t bytes_offset;
  uint64_t destination;
  size_t nbytes;
  uint64_t file_offset;
  size_t file_nbytes;  // read for it; 0 when the bytes never left memory
};

// Brings bytes from one device to slabs and back. [Note: order on a device]
//
// One thread queues copies on the driver's two streams, so that nobody who trains waits for it: a
// copy out after the producer's fence, a copy in after the destination's. Two watchers learn when
// copies are over: then a slab goes on to its file, or back to the pool. Memory of the training
// process may be used again earlier, by a stream that waits for the copy: make_wait() of the
// request.
class DeviceCopier {
 public:
  struct Shared {
    std::shared_ptr<Monitor> monitor;
    std::shared_ptr<SlabPool> pool;
    Scheduler* scheduler;
    bool has_checksum;
    std::shared_ptr<PinnedRegion> host;  // null without a host tier
  };

  DeviceCopier(Shared shared, std::shared_ptr<DeviceDriver> driver);
  ~DeviceCopier() { stop(); }

  const std::shared_ptr<Doorbell>& doorbell() const { return doorbell_; }
  void start();

  // monitor->mutex held; the doorbell is rung here.
  void enqueue(std::shared_ptr<WriteState> write, WriteTarget target);
  void enqueue(CopyIn job);
  // A part that must be read from its file first.
  void enqueue(std::shared_ptr<ReadState> read, ReadTransfer::Source source, const OpenFile& file,
               uint64_t destination);
  // monitor->mutex held: gives up what has not begun.
  void cancel_queued();
  void stop();

 private:
  struct StagedRead {
    std::shared_ptr<ReadState> read;
    ReadTransfer::Source source;
    const OpenFile* file;
    uint64_t destination;
  };
  void run();
  bool run_one();
  void stage(SlabLease lease);  // monitor->mutex held
  void issue(CopyIn job);
  void issue(WriteQueue::Job job);
  // `copy(offset, nbytes)` for each piece of host memory that one copy may touch.
  template <typename Copy>
  void for_each_copy(const char* host, size_t nbytes, Copy copy) const {
    for (size_t done = 0; done < nbytes;) {
      size_t step =
          shared_.host ? shared_.host->copyable_nbytes(host + done, nbytes - done) : nbytes - done;
      copy(done, step);
      done += step;
    }
  }
  std::shared_ptr<Fence> queue_copies(const WriteQueue::Job& job);
  void note_copied_out(const WriteQueue::Job& job, double seconds);
  void add_checksums(const WriteQueue::Job& job);
  static void fail(const CopyIn& job, const std::string& error, bool was_issued);

  const Shared shared_;
  const std::shared_ptr<DeviceDriver> driver_;
  const std::shared_ptr<Doorbell> doorbell_;
  WriteQueue writes_;
  std::deque<StagedRead> reads_;
  std::deque<CopyIn> copies_in_;
  std::atomic<bool> is_stopping_{false};
  ThreadGroup thread_;
  FenceWatcher out_watcher_;
  FenceWatcher in_watcher_;
};

}  // namespace ssdtrain
