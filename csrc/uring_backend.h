#pragma once

#include <exception>
#include <future>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "io_backend.h"
#include "ring.h"
#include "thread_group.h"
#include "unique_fd.h"

namespace ssdtrain {

// Memory whose transfers are worth registering with the kernel; no operation crosses a multiple of
// unit_nbytes.
struct StagingSpan {
  char* data;
  size_t nbytes;
  size_t unit_nbytes;
};

// An open file that nobody needs yet: a ring tries it out on one block, and leaves it as long as it
// was.
struct ProbeFile {
  int fd = -1;
  size_t block_nbytes = 0;
  std::string directory;
};

// io_uring: one thread submits and reaps. It sleeps in the kernel; an eventfd in the ring wakes it
// when other threads have operations for it. Destroying it needs nothing in flight.
class UringBackend : public IoBackend {
 public:
  // Writes and reads the first block of `probe`; throws PosixError when the ring cannot be set up
  // or the block does not come back.
  UringBackend(size_t depth, StagingSpan staging, const ProbeFile& probe, OnComplete on_complete);
  ~UringBackend() override;

  const char* kind() const override { return "io_uring"; }
  size_t depth() const override { return depth_; }
  bool has_registered_buffers() const override { return is_registered_; }
  std::vector<std::string> notes() const override { return notes_; }
  void submit(const IoOp& op) override;
  void stop() override;

 private:
  void run(const ProbeFile& probe, std::promise<void>& opened);
  void open(Ring* ring, const ProbeFile& probe);
  void prepare_staging(Ring* ring);
  // Whether the buffer is registered, from its first use on; the ring thread's.
  bool is_fixed(size_t index);
  int probe_once(Ring* ring, const ProbeFile& probe);
  void serve(Ring* ring);
  // Moves submitted operations into the ring; false when stopping.
  bool take_inbox(Ring* ring);
  void stay_awake();
  void reap(Ring* ring);
  void fail_unsubmitted(Ring* ring, int errnum);
  void arm_wakeup(Ring* ring);
  void fill(const IoOp& op, io_uring_sqe* entry);
  void fill_transfer(const IoOp& op, io_uring_sqe* entry);
  int probe_with(const IoOp& op, Ring* ring);
  static void fix(const IoOp& op, size_t index, io_uring_sqe* entry);

  const size_t depth_;
  const StagingSpan staging_;
  const size_t buffer_nbytes_;  // of one registered buffer
  const OnComplete on_complete_;
  bool is_registered_ = false;
  std::vector<std::string> notes_;

  std::mutex mutex_;  // the members below, and writing to wakeup_
  std::vector<IoOp> inbox_;
  bool is_asleep_ = false;
  bool is_stopping_ = false;
  UniqueFd wakeup_;

  // The ring thread's.
  enum class Fixed : char { kUnknown, kYes, kNo };
  Ring* ring_ = nullptr;
  struct Free {
    void operator()(char* memory) const { std::free(memory); }
  };
  std::unique_ptr<char, Free> probe_block_;  // registered as long as the ring is
  std::vector<Fixed> fixed_;
  std::vector<IoOp> batch_;
  ThreadGroup threads_;
};

}  // namespace ssdtrain
