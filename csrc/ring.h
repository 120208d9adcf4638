#pragma once

#include <linux/io_uring.h>
#include <sys/uio.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

#include "unique_fd.h"

namespace ssdtrain {

// A mapping of the ring's shared memory.
class RingMapping {
 public:
  RingMapping(int fd, size_t nbytes, uint64_t offset);
  RingMapping(const RingMapping&) = delete;
  RingMapping& operator=(const RingMapping&) = delete;
  ~RingMapping();
  template <typename T>
  T* at(size_t offset) const {
    return reinterpret_cast<T*>(data_ + offset);
  }

 private:
  char* data_;
  size_t nbytes_;
};

// The io_uring system calls, without a library. Used by the one thread that creates it.
class Ring {
 public:
  // Throws PosixError where the kernel forbids or lacks io_uring.
  explicit Ring(unsigned num_entries);

  // A zeroed submission entry; the caller never prepares more than num_entries before enter().
  io_uring_sqe* prepare();
  // Submits what is prepared and sleeps until `min_complete` completions are there. 0 or errno.
  int enter(unsigned min_complete);
  // The next completion, or false.
  bool pop(io_uring_cqe* completion);
  // Takes back one prepared entry the kernel has not accepted; false when there is none.
  bool take_unsubmitted(io_uring_sqe* entry);
  // Makes room for `num` buffers to be registered one by one. 0 or errno.
  int reserve_buffers(size_t num);
  // Registers one; the kernel pins its pages, which makes them memory in use. 0 or errno.
  int register_buffer(size_t index, iovec buffer);

 private:
  unsigned num_unsubmitted() const;

  io_uring_params params_;
  UniqueFd fd_;
  RingMapping rings_;
  RingMapping entries_;
  unsigned tail_ = 0;
};

}  // namespace ssdtrain
