#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "device_driver.h"
#include "monitor.h"

namespace ssdtrain {

struct ReadError {
  int errnum;
  uint64_t offset;
  uint64_t nbytes;
  std::string message;
};

// When a read got where, by seconds_now(); 0 for what has not happened.
struct ReadMoments {
  double queued = 0.0;
  double read_begun = 0.0;  // of the first part that comes from the file
  double done = 0.0;
};

// The life of one read request: a number of parts, from the file or from memory.
class ReadState {
 public:
  // `ready`: the point in a stream after which a destination in device memory may be written; null
  // for host memory, which may be written at once.
  ReadState(std::shared_ptr<Monitor> monitor, size_t num_parts,
            std::shared_ptr<Fence> ready = nullptr);
  ReadState(const ReadState&) = delete;
  ReadState& operator=(const ReadState&) = delete;

  // For the owner of the request: any thread, no lock held.
  bool is_done() const { return num_unfinished_.load() == 0; }
  bool wait_done(std::chrono::duration<double> timeout);
  // Whether every part is there, has failed, or is being copied by a stream: in the order of
  // streams the destination holds the bytes after make_wait(). In host memory this is is_done().
  bool is_issued() const { return ready_ ? num_unissued_.load() == 0 : is_done(); }
  bool wait_issued(std::chrono::duration<double> timeout);
  // From now on it goes before reads that nobody waits for. Both waits imply it.
  void expedite();
  // Work queued on `stream` later comes after the copies issued so far.
  void make_wait(DeviceDriver::Stream stream) const;
  std::optional<ReadError> error() const;
  ReadMoments moments() const;
  uint64_t read_nbytes() const { return read_nbytes_.load(); }
  uint64_t forwarded_nbytes() const { return forwarded_nbytes_.load(); }

  // For the engine: monitor->mutex held.
  bool is_awaited() const { return is_awaited_; }
  // The drive is asked for a part.
  void note_begun();
  // A stream will have brought a part after `there`.
  void note_issued(std::shared_ptr<Fence> there);
  // Where bytes of a part came from: slabs or the drive. Known before the part is issued, so that
  // whoever was handed the destination finds them counted.
  void count_forwarded(size_t nbytes);
  void count_read(size_t nbytes);
  void finish();  // one part
  // `was_issued`: the stream failed, after note_issued().
  void finish_failed(ReadError error, bool was_issued = false);

  const std::shared_ptr<Fence>& ready() const { return ready_; }

 private:
  void mark_issued();
  void await();  // monitor_->mutex held

  const std::shared_ptr<Monitor> monitor_;
  const std::shared_ptr<Fence> ready_;
  std::shared_ptr<Fence> last_copy_;  // a stream runs in order: covers all earlier ones
  std::optional<ReadError> error_;    // the first
  ReadMoments moments_;
  std::condition_variable changed_;
  bool is_awaited_ = false;
  std::atomic<size_t> num_unissued_;  // parts
  std::atomic<size_t> num_unfinished_;
  std::atomic<uint64_t> read_nbytes_{0};
  std::atomic<uint64_t> forwarded_nbytes_{0};
};

}  // namespace ssdtrain
