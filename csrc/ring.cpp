#include "ring.h"

#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "posix_error.h"

namespace ssdtrain {

namespace {

// IORING_REGISTER_BUFFERS_UPDATE and its argument, which headers before Linux 5.13 do not have.
constexpr unsigned kRegisterBuffersUpdate = 16;
struct BufferUpdate {
  uint32_t offset;
  uint32_t reserved;
  uint64_t data;
  uint64_t tags;
  uint32_t num;
  uint32_t reserved2;
};

int setup(unsigned num_entries, unsigned flags, io_uring_params* params) {
  std::memset(params, 0, sizeof *params);
  params->flags = flags;
  int fd = static_cast<int>(::syscall(__NR_io_uring_setup, num_entries, params));
  return fd >= 0 ? fd : -errno;
}

// Completions are run by the ring's own thread when it asks, not by interrupting it; kernels
// before 6.1 know only the plain ring.
UniqueFd open_ring(unsigned num_entries, io_uring_params* params) {
  int fd = -EINVAL;
#if defined(IORING_SETUP_SINGLE_ISSUER) && defined(IORING_SETUP_DEFER_TASKRUN)
  fd = setup(num_entries, IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN, params);
#endif
  if (fd == -EINVAL) fd = setup(num_entries, 0, params);
  if (fd < 0) throw PosixError(-fd, "Expected io_uring_setup to succeed", "");
  return UniqueFd(fd);
}

size_t rings_nbytes(const io_uring_params& params) {
  if ((params.features & IORING_FEAT_SINGLE_MMAP) == 0) {
    throw PosixError(ENOSYS, "Expected a kernel with IORING_FEAT_SINGLE_MMAP (Linux 5.4)", "");
  }
  size_t submission = params.sq_off.array + params.sq_entries * sizeof(unsigned);
  size_t completion = params.cq_off.cqes + params.cq_entries * sizeof(io_uring_cqe);
  return std::max(submission, completion);
}

}  // namespace

RingMapping::RingMapping(int fd, size_t nbytes, uint64_t offset) : nbytes_(nbytes) {
  void* memory = ::mmap(nullptr, nbytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd,
                        static_cast<off_t>(offset));
  if (memory == MAP_FAILED) throw PosixError(errno, "Expected to map the ring", "");
  data_ = static_cast<char*>(memory);
  ::madvise(memory, nbytes, MADV_DONTFORK);
}

RingMapping::~RingMapping() { ::munmap(data_, nbytes_); }

Ring::Ring(unsigned num_entries)
    : fd_(open_ring(num_entries, &params_)),
      rings_(fd_.get(), rings_nbytes(params_), IORING_OFF_SQ_RING),
      entries_(fd_.get(), params_.sq_entries * sizeof(io_uring_sqe), IORING_OFF_SQES) {
  unsigned* array = rings_.at<unsigned>(params_.sq_off.array);
  for (unsigned i = 0; i < params_.sq_entries; ++i) array[i] = i;
}

io_uring_sqe* Ring::prepare() {
  unsigned mask = *rings_.at<unsigned>(params_.sq_off.ring_mask);
  io_uring_sqe* entry = entries_.at<io_uring_sqe>(0) + (tail_++ & mask);
  std::memset(entry, 0, sizeof *entry);
  return entry;
}

unsigned Ring::num_unsubmitted() const {
  return tail_ - __atomic_load_n(rings_.at<unsigned>(params_.sq_off.head), __ATOMIC_ACQUIRE);
}

int Ring::enter(unsigned min_complete) {
  __atomic_store_n(rings_.at<unsigned>(params_.sq_off.tail), tail_, __ATOMIC_RELEASE);
  long rc = ::syscall(__NR_io_uring_enter, fd_.get(), num_unsubmitted(), min_complete,
                      IORING_ENTER_GETEVENTS, nullptr, 0);
  return rc >= 0 ? 0 : errno;
}

bool Ring::pop(io_uring_cqe* completion) {
  unsigned* head = rings_.at<unsigned>(params_.cq_off.head);
  unsigned* tail = rings_.at<unsigned>(params_.cq_off.tail);
  if (*head == __atomic_load_n(tail, __ATOMIC_ACQUIRE)) return false;
  unsigned mask = *rings_.at<unsigned>(params_.cq_off.ring_mask);
  *completion = rings_.at<io_uring_cqe>(params_.cq_off.cqes)[*head & mask];
  __atomic_store_n(head, *head + 1, __ATOMIC_RELEASE);
  return true;
}

bool Ring::take_unsubmitted(io_uring_sqe* entry) {
  if (num_unsubmitted() == 0) return false;
  unsigned mask = *rings_.at<unsigned>(params_.sq_off.ring_mask);
  *entry = entries_.at<io_uring_sqe>(0)[--tail_ & mask];
  __atomic_store_n(rings_.at<unsigned>(params_.sq_off.tail), tail_, __ATOMIC_RELEASE);
  return true;
}

int Ring::reserve_buffers(size_t num) {
  std::vector<iovec> none(num);  // since Linux 5.13 a buffer may be none
  long rc = ::syscall(__NR_io_uring_register, fd_.get(), IORING_REGISTER_BUFFERS, none.data(),
                      static_cast<unsigned>(num));
  return rc >= 0 ? 0 : errno;
}

int Ring::register_buffer(size_t index, iovec buffer) {
  BufferUpdate request{};
  request.offset = static_cast<uint32_t>(index);
  request.data = reinterpret_cast<uint64_t>(&buffer);
  request.num = 1;
  long rc = ::syscall(__NR_io_uring_register, fd_.get(), kRegisterBuffersUpdate, &request,
                      sizeof request);
  return rc >= 0 ? 0 : errno;
}

}  // namespace ssdtrain
