#include "direct_io.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <memory>
#include <system_error>
#include <vector>

#include "posix_error.h"

namespace ssdtrain {

namespace {

constexpr size_t kPageNbytes = 4096;

// The kernel's struct statx as far as we read it; glibc's header may be older than the kernel.
struct RawStatx {
  uint32_t mask;
  unsigned char before[148];
  uint32_t dio_memory_alignment;
  uint32_t dio_offset_alignment;
  unsigned char after[96];
};
static_assert(sizeof(RawStatx) == 256, "struct statx is 256 bytes");

constexpr uint32_t kStatxDioAlign = 0x2000;

struct Alignment {
  size_t block;
  size_t memory;
};

bool query_statx(int fd, RawStatx* raw) {
  std::memset(raw, 0, sizeof *raw);
  int rc = ::syscall(SYS_statx, fd, "", AT_EMPTY_PATH, kStatxDioAlign, raw);
  return rc == 0 && (raw->mask & kStatxDioAlign) != 0;
}

// The block size of the device below `fd`; 0 where sysfs does not say (network, tmpfs).
size_t logical_block_nbytes(int fd) {
  struct stat status;
  if (::fstat(fd, &status) != 0) return 0;
  std::string device = "/sys/dev/block/" + std::to_string(major(status.st_dev)) + ":" +
                       std::to_string(minor(status.st_dev));
  for (const char* tail : {"/queue/logical_block_size", "/../queue/logical_block_size"}) {
    std::ifstream file(device + tail);
    size_t nbytes = 0;
    if (file >> nbytes) return nbytes;
  }
  return 0;
}

bool set_direct(int fd, bool on) {
  int flags = ::fcntl(fd, F_GETFL);
  flags = on ? flags | O_DIRECT : flags & ~O_DIRECT;
  return ::fcntl(fd, F_SETFL, flags) == 0;
}

// Writes one block and reads it back from memory that is aligned to `alignment.memory` and to
// nothing more. Returns 0 or the errno.
int try_one_block(int fd, Alignment alignment) {
  size_t block = alignment.block;
  size_t shift = alignment.memory % kPageNbytes;
  size_t page = std::max(kPageNbytes, alignment.memory);
  std::unique_ptr<void, decltype(&std::free)> memory(
      std::aligned_alloc(page, (2 * block + shift + page - 1) / page * page), &std::free);
  if (!memory) return ENOMEM;
  char* out = static_cast<char*>(memory.get()) + shift;
  char* in = out + block;
  std::memset(out, 0x5A, block);
  ssize_t written = ::pwrite(fd, out, block, 0);
  if (written < 0) return errno;
  ssize_t read = ::pread(fd, in, block, 0);
  if (read < 0) return errno;
  bool is_whole = written == static_cast<ssize_t>(block) && read == written;
  return is_whole && std::memcmp(in, out, block) == 0 ? 0 : EIO;
}

bool is_about_alignment(int errnum) { return errnum == EINVAL || errnum == EOPNOTSUPP; }

std::vector<Alignment> candidates(int fd, const RawStatx* statx) {
  size_t least = std::max<size_t>(512, logical_block_nbytes(fd));
  if (statx != nullptr) {
    size_t memory = std::max<size_t>(1, statx->dio_memory_alignment);
    size_t block = std::max({least, size_t{statx->dio_offset_alignment}, memory});
    return {{block, memory}, {block, block}};
  }
  if (least >= kPageNbytes) return {{least, least}};
  return {{least, least}, {kPageNbytes, kPageNbytes}};
}

DirectIo buffered(int fd, const std::string& reason) {
  set_direct(fd, false);
  DirectIo result;
  result.block_nbytes = std::max<size_t>(512, logical_block_nbytes(fd));
  result.reason = "buffered: " + reason;
  return result;
}

DirectIo direct(Alignment alignment, bool is_statx) {
  DirectIo result;
  result.is_direct = true;
  result.block_nbytes = alignment.block;
  result.memory_alignment = alignment.memory;
  result.reason = "direct: " + std::to_string(alignment.block) + "-byte blocks, " +
                  std::to_string(alignment.memory) + "-byte memory alignment, " +
                  (is_statx ? "from statx" : "found by trying") + ", checked by a write and a read";
  return result;
}

}  // namespace

DirectIo direct_io_of(int fd) {
  RawStatx statx;
  DirectIo result;
  if (query_statx(fd, &statx)) {
    result.is_direct = statx.dio_offset_alignment != 0;
    result.block_nbytes = std::max<size_t>(512, statx.dio_offset_alignment);
    result.memory_alignment = std::max<size_t>(1, statx.dio_memory_alignment);
    result.reason = result.is_direct
                        ? "direct: alignment from statx"
                        : "buffered: the file system reports no direct I/O for this file";
    return result;
  }
  result.is_direct = true;
  result.block_nbytes = std::max(kPageNbytes, logical_block_nbytes(fd));
  result.memory_alignment = result.block_nbytes;
  result.reason = "direct: whole pages, as the kernel does not say more";
  return result;
}

DirectIo enable_direct_io(int fd, const std::string& directory) {
  RawStatx statx;
  bool is_known = query_statx(fd, &statx);
  if (is_known && statx.dio_offset_alignment == 0) {
    return buffered(fd, "the file system reports no direct I/O for this file");
  }
  if (!set_direct(fd, true)) return buffered(fd, "the file system refuses O_DIRECT");
  for (Alignment alignment : candidates(fd, is_known ? &statx : nullptr)) {
    int errnum = try_one_block(fd, alignment);
    if (errnum == 0) {
      if (::ftruncate(fd, 0) != 0) throw PosixError(errno, "ftruncate failed", directory);
      return direct(alignment, is_known);
    }
    if (!is_about_alignment(errnum)) {
      throw PosixError(errnum, "Expected to write and read one block directly", directory);
    }
  }
  return buffered(fd, "direct writes of 512 and 4096 bytes are refused");
}

}  // namespace ssdtrain
