#include "mapped_region.h"

#include <sys/mman.h>

#include <cerrno>
#include <cstdint>
#include <string>

#include "posix_error.h"

namespace ssdtrain {

namespace {

constexpr size_t kHugePageNbytes = size_t{2} << 20;

char* map_anonymous(size_t nbytes, MappedRegion::Kind kind) {
  bool is_memory = kind == MappedRegion::Kind::kMemory;
  int flags = MAP_PRIVATE | MAP_ANONYMOUS | (is_memory ? 0 : MAP_NORESERVE);
  void* memory = ::mmap(nullptr, nbytes, PROT_READ | PROT_WRITE, flags, -1, 0);
  if (memory == MAP_FAILED) {
    throw PosixError(errno,
                     "Expected " + std::to_string(nbytes) +
                         (is_memory ? " bytes of memory for staging, got an error from mmap; "
                                      "lower the staging size"
                                    : " bytes of address space for the host tier, got an error "
                                      "from mmap; lower host_nbytes"),
                     "");
  }
  return static_cast<char*>(memory);
}

}  // namespace

MappedRegion::MappedRegion(size_t nbytes, Kind kind) : nbytes_(nbytes) {
  char* raw = map_anonymous(nbytes + kHugePageNbytes, kind);
  size_t misaligned = reinterpret_cast<uintptr_t>(raw) % kHugePageNbytes;
  size_t head = misaligned == 0 ? 0 : kHugePageNbytes - misaligned;
  data_ = raw + head;
  if (head > 0) ::munmap(raw, head);
  if (head < kHugePageNbytes) ::munmap(data_ + nbytes, kHugePageNbytes - head);
  // Both are wishes: without them the engine is slower or a fork dearer, never wrong.
  ::madvise(data_, nbytes, MADV_HUGEPAGE);
  ::madvise(data_, nbytes, MADV_DONTFORK);
}

MappedRegion::~MappedRegion() { ::munmap(data_, nbytes_); }

}  // namespace ssdtrain
