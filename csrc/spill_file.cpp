#include "spill_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <random>
#include <stdexcept>

#include "monitor.h"
#include "posix_error.h"

namespace ssdtrain {

namespace {

constexpr int kMaxNameAttempts = 100;

bool lacks_tmpfile(int errnum) {
  return errnum == EOPNOTSUPP || errnum == EISDIR || errnum == ENOENT || errnum == EINVAL ||
         errnum == ENOSYS;
}

std::string random_name() {
  std::random_device random;
  char name[64];
  std::snprintf(name, sizeof name, ".ssdtrain-%08x%08x.spill", random(), random());
  return name;
}

// For file systems without O_TMPFILE: a fresh name that nobody else can have opened, unlinked
// before the first byte.
UniqueFd open_and_unlink(const std::string& directory) {
  for (int attempt = 0; attempt < kMaxNameAttempts; ++attempt) {
    std::string path = directory + "/" + random_name();
    UniqueFd fd(::open(path.c_str(), O_RDWR | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600));
    if (fd) {
      if (::unlink(path.c_str()) != 0) throw PosixError(errno, "unlink failed", path);
      return fd;
    }
    if (errno != EEXIST && errno != EINTR) break;
  }
  throw PosixError(errno, "Expected to create a spill file", directory);
}

UniqueFd open_unlinked(const std::string& directory) {
  int fd;
  do {
    fd = ::open(directory.c_str(), O_TMPFILE | O_RDWR | O_EXCL | O_CLOEXEC, 0600);
  } while (fd < 0 && errno == EINTR);
  if (fd >= 0) return UniqueFd(fd);
  if (!lacks_tmpfile(errno)) throw PosixError(errno, "Expected to create a spill file", directory);
  return open_and_unlink(directory);
}

int retry_fallocate(int fd, uint64_t from, uint64_t to) {
  int rc;
  do {
    rc = ::fallocate(fd, 0, static_cast<off_t>(from), static_cast<off_t>(to - from));
  } while (rc != 0 && errno == EINTR);
  return rc == 0 ? 0 : errno;
}

}  // namespace

SpillFile::SpillFile(const std::string& directory, std::optional<uint64_t> cap_nbytes, size_t user)
    : directory_(directory), user_(user), cap_nbytes_(cap_nbytes) {
  if (user >= kMaxUsers) {
    throw std::invalid_argument("Expected a user below " + std::to_string(kMaxUsers) + ", got " +
                                std::to_string(user));
  }
  UniqueFd fd = open_unlinked(directory);
  io_ = enable_direct_io(fd.get(), directory);
  file_ = std::make_shared<const OpenFile>(OpenFile{std::move(fd), io_, user});
}

std::shared_ptr<const OpenFile> SpillFile::open_file() const {
  std::lock_guard<std::mutex> lock(mutex_);
  if (!file_) {
    throw std::runtime_error("Expected an open spill file, got a closed one in " + directory_ +
                             "; open a new SpillFile");
  }
  return file_;
}

void SpillFile::close() {
  std::shared_ptr<const OpenFile> file;  // closed without the lock: that may take a while
  std::lock_guard<std::mutex> lock(mutex_);
  file.swap(file_);
}

std::string SpillFile::fallocate_reason() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return fallocate_reason_;
}

void SpillFile::check_cap(uint64_t nbytes) const {
  if (!cap_nbytes_ || nbytes <= *cap_nbytes_) return;
  throw PosixError(EDQUOT,
                   "Expected at most cap_nbytes=" + std::to_string(*cap_nbytes_) +
                       " bytes in the spill file, got " + std::to_string(nbytes),
                   directory_);
}

void SpillFile::grow(uint64_t nbytes) {
  std::shared_ptr<const OpenFile> file = open_file();
  std::lock_guard<std::mutex> lock(length_mutex_);
  uint64_t block = io_.block_nbytes;
  uint64_t from = nbytes_.load(std::memory_order_relaxed);
  if (nbytes <= from) return;
  check_cap(nbytes);
  uint64_t to = (nbytes + block - 1) / block * block;
  if (cap_nbytes_) to = std::min(to, *cap_nbytes_ / block * block);
  if (to == from) return;
  reserve(file->fd.get(), from, to);
  nbytes_.store(to, std::memory_order_release);
}

void SpillFile::shrink_to_nothing() {
  std::shared_ptr<const OpenFile> file = open_file();
  std::lock_guard<std::mutex> lock(length_mutex_);
  if (::ftruncate(file->fd.get(), 0) != 0)
    throw PosixError(errno, "Expected to shrink", directory_);
  nbytes_.store(0, std::memory_order_release);
}

void SpillFile::reserve(int fd, uint64_t from, uint64_t to) {
  int errnum = retry_fallocate(fd, from, to);
  if (errnum == EOPNOTSUPP || errnum == ENOSYS) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      fallocate_reason_ = "the file system has no fallocate: space is not reserved ahead";
    }
    errnum = ::ftruncate(fd, static_cast<off_t>(to)) == 0 ? 0 : errno;
  }
  if (errnum == 0) return;
  // A fallocate that fails half way may have lengthened the file.
  if (::ftruncate(fd, static_cast<off_t>(from)) != 0) {
    // The first error is the one to report; the tail is beyond nbytes and never used.
  }
  throw PosixError(errnum, "Expected to reserve " + std::to_string(to) + " bytes", directory_);
}

}  // namespace ssdtrain
