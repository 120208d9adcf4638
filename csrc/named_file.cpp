#include "named_file.h"

#include <fcntl.h>
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <stdexcept>
#include <utility>

#include "posix_error.h"

namespace ssdtrain {

namespace {

constexpr size_t kMaxUnitNbytes = size_t{64} << 10;

UniqueFd open_retried(const std::string& path, int flags, mode_t mode) {
  int fd;
  do {
    fd = ::open(path.c_str(), flags | O_CLOEXEC | O_NOCTTY, mode);
  } while (fd < 0 && errno == EINTR);
  return UniqueFd(fd);
}

}  // namespace

NamedFile::NamedFile(const std::string& path, int flags, mode_t mode, bool wants_direct)
    : path_(path), is_writable_((flags & O_ACCMODE) != O_RDONLY) {
  UniqueFd fd = open_retried(path, (flags & ~O_DIRECT) | O_NONBLOCK, mode);  // of a pipe: at once
  if (!fd) throw PosixError(errno, "Expected to open a file", path);
  struct stat status;
  if (::fstat(fd.get(), &status) != 0) throw PosixError(errno, "Expected to look at a file", path);
  if (!S_ISREG(status.st_mode)) {
    throw PosixError(S_ISDIR(status.st_mode) ? EISDIR : EINVAL,
                     "Expected a regular file, got something else", path);
  }
  // Network file systems mean something else by it, and have far larger ones.
  unit_nbytes_ = std::clamp<size_t>(status.st_blksize, kPageNbytes, kMaxUnitNbytes);
  io_.reason = wants_direct ? "buffered: the file system refuses O_DIRECT"
                            : "buffered: direct I/O was not asked for";
  buffered_ = std::make_shared<const OpenFile>(OpenFile{std::move(fd), DirectIo{}, 0});
  if (wants_direct) open_direct(flags & O_ACCMODE);
}

void NamedFile::open_direct(int flags) {
  std::string again = "/proc/self/fd/" + std::to_string(buffered_->fd.get());
  UniqueFd fd = open_retried(again, flags | O_DIRECT, 0);
  if (!fd) return;
  io_ = direct_io_of(fd.get());
  if (!io_.is_direct) return;
  unit_nbytes_ = std::max(unit_nbytes_, io_.block_nbytes);
  direct_ = std::make_shared<const OpenFile>(OpenFile{std::move(fd), io_, 0});
}

void NamedFile::close() {
  std::shared_ptr<const OpenFile> buffered, direct;  // closed without the lock
  std::lock_guard<std::mutex> lock(mutex_);
  buffered.swap(buffered_);
  direct.swap(direct_);
}

std::shared_ptr<const OpenFile> NamedFile::buffered() const {
  std::lock_guard<std::mutex> lock(mutex_);
  if (buffered_) return buffered_;
  throw std::invalid_argument("Expected an open file, got a closed one: " + path_);
}

std::shared_ptr<const OpenFile> NamedFile::direct() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return direct_;
}

}  // namespace ssdtrain
