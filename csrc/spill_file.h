#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>

#include "direct_io.h"
#include "pulse.h"
#include "unique_fd.h"

namespace ssdtrain {

// The open descriptor and what transfers through it must obey. Shared with the engines that use it,
// so that closing a SpillFile never lets a transfer in flight hit a reused descriptor.
struct OpenFile {
  UniqueFd fd;
  DirectIo io;
  size_t user;
  mutable Pulse pulse{};
};

// One preallocated, already unlinked file in a directory, for this process's eyes only.
class SpillFile {
 public:
  // `user`: below kMaxUsers, whose traffic this is where several share an engine.
  SpillFile(const std::string& directory, std::optional<uint64_t> cap_nbytes, size_t user = 0);
  SpillFile(const SpillFile&) = delete;
  SpillFile& operator=(const SpillFile&) = delete;

  // Gives all space back; nothing of the file may be needed or in flight.
  void shrink_to_nothing();
  // Makes the file at least `nbytes` long, space reserved. Throws PosixError and leaves the file as
  // it was when the directory has no room or `nbytes` exceeds the cap.
  void grow(uint64_t nbytes);
  void close();

  // Throws when the file is closed.
  std::shared_ptr<const OpenFile> open_file() const;
  int fd() const { return open_file()->fd.get(); }
  uint64_t nbytes() const { return nbytes_.load(std::memory_order_acquire); }
  const std::string& directory() const { return directory_; }
  size_t user() const { return user_; }
  const DirectIo& io() const { return io_; }
  std::optional<uint64_t> cap_nbytes() const { return cap_nbytes_; }
  std::string fallocate_reason() const;

 private:
  void check_cap(uint64_t nbytes) const;
  void reserve(int fd, uint64_t from, uint64_t to);

  const std::string directory_;
  const size_t user_;
  const std::optional<uint64_t> cap_nbytes_;
  DirectIo io_;
  std::mutex length_mutex_;   // held while the file grows or shrinks
  mutable std::mutex mutex_;  // file_ and fallocate_reason_; never held while the drive is asked
  std::shared_ptr<const OpenFile> file_;
  std::string fallocate_reason_;
  std::atomic<uint64_t> nbytes_{0};
};

}  // namespace ssdtrain
