#include "uring_backend.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "posix_error.h"

namespace ssdtrain {

namespace {

constexpr size_t kMaxBufferNbytes = size_t{1} << 30;  // the kernel's limit for one buffer
constexpr size_t kMaxBuffers = 1024;
constexpr uint64_t kWakeup = 0;  // no context has this address
constexpr useconds_t kBackOffMicroseconds = 1000;

size_t registered_nbytes(const StagingSpan& staging) {
  if (staging.unit_nbytes == 0) return 0;
  size_t num_units = (staging.nbytes / staging.unit_nbytes + kMaxBuffers - 1) / kMaxBuffers;
  size_t nbytes = num_units * staging.unit_nbytes;
  return nbytes <= kMaxBufferNbytes ? nbytes : 0;
}

// Whether so much memory may be locked, told without touching it. 0 or errno.
int try_lock(const StagingSpan& staging) {
  if (::mlock2(staging.data, staging.nbytes, MLOCK_ONFAULT) != 0) return errno;
  ::munlock(staging.data, staging.nbytes);
  return 0;
}

bool is_temporary(int errnum) {
  return errnum == EINTR || errnum == EAGAIN || errnum == EBUSY || errnum == ENOMEM;
}

// Runs one prepared entry to its end; bytes moved or -errno.
int run_one(Ring* ring) {
  io_uring_cqe completion;
  while (!ring->pop(&completion)) {
    int errnum = ring->enter(1);
    if (errnum != 0 && errnum != EINTR) return -errnum;
  }
  return completion.res;
}

}  // namespace

UringBackend::UringBackend(size_t depth, StagingSpan staging, const ProbeFile& probe,
                           OnComplete on_complete)
    : depth_(depth),
      staging_(staging),
      buffer_nbytes_(registered_nbytes(staging)),
      on_complete_(std::move(on_complete)),
      wakeup_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
  if (!wakeup_) throw PosixError(errno, "Expected to open an eventfd", probe.directory);
  auto opened = std::make_shared<std::promise<void>>();
  std::future<void> outcome = opened->get_future();
  // The ring belongs to the thread that creates it.
  threads_.spawn("ssdtrain-ring", [this, probe, opened] { run(probe, *opened); });
  try {
    outcome.get();
  } catch (...) {
    threads_.join();
    throw;
  }
}

UringBackend::~UringBackend() { stop(); }

void UringBackend::submit(const IoOp& op) {
  std::lock_guard<std::mutex> lock(mutex_);
  inbox_.push_back(op);
  // Under the lock: once the operation is done, this object may be on its way out.
  if (std::exchange(is_asleep_, false)) ::eventfd_write(wakeup_.get(), 1);
}

void UringBackend::stop() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    is_stopping_ = true;
    if (wakeup_) ::eventfd_write(wakeup_.get(), 1);
  }
  threads_.join();
  std::lock_guard<std::mutex> lock(mutex_);
  wakeup_ = UniqueFd();
}

void UringBackend::run(const ProbeFile& probe, std::promise<void>& opened) {
  std::unique_ptr<Ring> ring;
  try {
    ring = std::make_unique<Ring>(static_cast<unsigned>(depth_ + 1));
    ring_ = ring.get();
    open(ring.get(), probe);
  } catch (...) {
    ring.reset();
    opened.set_exception(std::current_exception());
    return;
  }
  opened.set_value();
  serve(ring.get());
}

void UringBackend::open(Ring* ring, const ProbeFile& probe) {
  prepare_staging(ring);
  int errnum = probe_once(ring, probe);
  if (errnum != 0 && is_registered_) {
    is_registered_ = false;
    notes_.push_back(std::string("buffers not registered: probe failed, ") + std::strerror(errnum));
    errnum = probe_once(ring, probe);
  }
  if (errnum != 0) {
    throw PosixError(errnum, "Expected one block to be written and read through the ring",
                     probe.directory);
  }
}

// Registered memory is in use whether or not anything was ever written to it. So each buffer is
// registered when it is first used: memory follows the need.
void UringBackend::prepare_staging(Ring* ring) {
  int errnum = EFBIG;
  if (buffer_nbytes_ > 0) {
    fixed_.assign((staging_.nbytes + buffer_nbytes_ - 1) / buffer_nbytes_, Fixed::kUnknown);
    errnum = try_lock(staging_);
    if (errnum == 0) errnum = ring->reserve_buffers(fixed_.size() + 1);  // and the probe's
  }
  is_registered_ = errnum == 0;
  if (!is_registered_) {
    notes_.push_back(std::string("buffers not registered: ") + std::strerror(errnum) +
                     (errnum == ENOMEM ? " (see ulimit -l)" : ""));
  }
}

bool UringBackend::is_fixed(size_t index) {
  Fixed& fixed = fixed_[index];
  if (fixed == Fixed::kUnknown) {
    char* data = staging_.data + index * buffer_nbytes_;
    size_t nbytes = std::min(buffer_nbytes_, staging_.nbytes - index * buffer_nbytes_);
    fixed = ring_->register_buffer(index, {data, nbytes}) == 0 ? Fixed::kYes : Fixed::kNo;
  }
  return fixed == Fixed::kYes;
}

int UringBackend::probe_once(Ring* ring, const ProbeFile& probe) {
  struct stat before;
  if (::fstat(probe.fd, &before) != 0) return errno;
  size_t nbytes = probe.block_nbytes;
  probe_block_.reset(static_cast<char*>(std::aligned_alloc(nbytes, nbytes)));
  char* block = probe_block_.get();
  if (!block) return ENOMEM;
  if (is_registered_) {
    int errnum = ring->register_buffer(fixed_.size(), {block, nbytes});
    if (errnum != 0) return errnum;
  }
  std::memset(block, 0xA5, nbytes);
  int written = probe_with({IoOp::Kind::kWrite, probe.fd, block, nbytes, 0, this}, ring);
  if (written < 0) return -written;
  std::memset(block, 0, nbytes);
  int read = probe_with({IoOp::Kind::kRead, probe.fd, block, nbytes, 0, this}, ring);
  if (::ftruncate(probe.fd, before.st_size) != 0) return errno;
  if (read < 0) return -read;
  bool is_whole = written == static_cast<int>(nbytes) && read == written;
  return is_whole && block[0] == '\xA5' && block[nbytes - 1] == '\xA5' ? 0 : EIO;
}

int UringBackend::probe_with(const IoOp& op, Ring* ring) {
  io_uring_sqe* entry = ring->prepare();
  fill(op, entry);
  if (is_registered_) fix(op, fixed_.size(), entry);
  return run_one(ring);
}

void UringBackend::serve(Ring* ring) {
  arm_wakeup(ring);
  while (take_inbox(ring)) {
    int errnum = ring->enter(1);
    stay_awake();
    if (errnum != 0 && !is_temporary(errnum)) fail_unsubmitted(ring, errnum);
    // Out of kernel memory or a full completion queue: rare, and it passes.
    if (errnum != 0 && errnum != EINTR) ::usleep(kBackOffMicroseconds);
    reap(ring);
  }
}

bool UringBackend::take_inbox(Ring* ring) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (is_stopping_ && inbox_.empty()) return false;
    batch_.swap(inbox_);
    is_asleep_ = true;
  }
  for (const IoOp& op : batch_) fill(op, ring->prepare());
  batch_.clear();
  return true;
}

void UringBackend::stay_awake() {
  std::lock_guard<std::mutex> lock(mutex_);
  is_asleep_ = false;
}

void UringBackend::reap(Ring* ring) {
  io_uring_cqe completion;
  while (ring->pop(&completion)) {
    if (completion.user_data == kWakeup) {
      eventfd_t count;
      ::eventfd_read(wakeup_.get(), &count);
      arm_wakeup(ring);
    } else {
      on_complete_(reinterpret_cast<void*>(completion.user_data), completion.res);
    }
  }
}

void UringBackend::fail_unsubmitted(Ring* ring, int errnum) {
  std::vector<void*> contexts;
  bool is_wakeup_lost = false;
  io_uring_sqe entry;
  while (ring->take_unsubmitted(&entry)) {
    if (entry.user_data == kWakeup) {
      is_wakeup_lost = true;
    } else {
      contexts.push_back(reinterpret_cast<void*>(entry.user_data));
    }
  }
  if (is_wakeup_lost) arm_wakeup(ring);
  for (void* context : contexts) on_complete_(context, -errnum);
}

void UringBackend::arm_wakeup(Ring* ring) {
  io_uring_sqe* entry = ring->prepare();
  entry->opcode = IORING_OP_POLL_ADD;
  entry->fd = wakeup_.get();
  entry->poll_events = POLLIN;
  entry->user_data = kWakeup;
}

void UringBackend::fill(const IoOp& op, io_uring_sqe* entry) {
  entry->fd = op.fd;
  entry->off = op.offset;
  entry->len = static_cast<uint32_t>(op.nbytes);
  entry->user_data = reinterpret_cast<uint64_t>(op.context);
  switch (op.kind) {
    case IoOp::Kind::kRead:
    case IoOp::Kind::kWrite:
      fill_transfer(op, entry);
      break;
    case IoOp::Kind::kSync:
      entry->opcode = IORING_OP_SYNC_FILE_RANGE;
      entry->sync_range_flags =
          SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WRITE | SYNC_FILE_RANGE_WAIT_AFTER;
      break;
    case IoOp::Kind::kDropCache:
      entry->opcode = IORING_OP_FADVISE;
      entry->fadvise_advice = POSIX_FADV_DONTNEED;
      break;
  }
}

void UringBackend::fix(const IoOp& op, size_t index, io_uring_sqe* entry) {
  bool is_write = op.kind == IoOp::Kind::kWrite;
  entry->opcode = is_write ? IORING_OP_WRITE_FIXED : IORING_OP_READ_FIXED;
  entry->buf_index = static_cast<uint16_t>(index);
}

void UringBackend::fill_transfer(const IoOp& op, io_uring_sqe* entry) {
  bool is_write = op.kind == IoOp::Kind::kWrite;
  entry->opcode = is_write ? IORING_OP_WRITE : IORING_OP_READ;
  entry->addr = reinterpret_cast<uint64_t>(op.address);
  bool is_staging = op.address >= staging_.data && op.address < staging_.data + staging_.nbytes;
  if (!is_registered_ || !is_staging) return;
  size_t index = (op.address - staging_.data) / buffer_nbytes_;
  if (!is_fixed(index)) return;
  fix(op, index, entry);
}

}  // namespace ssdtrain
