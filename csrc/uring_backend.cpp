#include "uring_backend.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "posix_error.h"

namespace ssdtrain {

namespace {

constexpr size_t kMaxBufferNbytes = size_t{1} << 30;  // the kernel's limit for one buffer
constexpr uint64_t kWakeup = 0;                       // no context has this address
constexpr useconds_t kBackOffMicroseconds = 1000;

size_t registered_nbytes(const StagingSpan& staging) {
  if (staging.unit_nbytes == 0 || staging.unit_nbytes > kMaxBufferNbytes) return 0;
  return kMaxBufferNbytes / staging.unit_nbytes * staging.unit_nbytes;
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
  threads_.spawn("ssdtrain-ring",
                 [this, probe, opened] { run(probe, *opened); });
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
  register_staging(ring);
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

void UringBackend::register_staging(Ring* ring) {
  std::vector<iovec> buffers;
  for (size_t at = 0; buffer_nbytes_ > 0 && at < staging_.nbytes; at += buffer_nbytes_) {
    buffers.push_back({staging_.data + at, std::min(buffer_nbytes_, staging_.nbytes - at)});
  }
  int errnum = buffers.empty() ? EFBIG : ring->register_buffers(buffers);
  is_registered_ = errnum == 0;
  if (!is_registered_) {
    notes_.push_back(std::string("buffers not registered: ") + std::strerror(errnum) +
                     (errnum == ENOMEM ? " (see ulimit -l)" : ""));
  }
}

int UringBackend::probe_once(Ring* ring, const ProbeFile& probe) {
  struct stat before;
  if (::fstat(probe.fd, &before) != 0) return errno;
  size_t nbytes = probe.block_nbytes;
  std::memset(staging_.data, 0xA5, nbytes);
  IoOp op{IoOp::Kind::kWrite, probe.fd, staging_.data, nbytes, 0, this};
  fill(op, ring->prepare());
  int written = run_one(ring);
  if (written < 0) return -written;
  std::memset(staging_.data, 0, nbytes);
  op.kind = IoOp::Kind::kRead;
  fill(op, ring->prepare());
  int read = run_one(ring);
  if (::ftruncate(probe.fd, before.st_size) != 0) return errno;
  if (read < 0) return -read;
  bool is_whole = written == static_cast<int>(nbytes) && read == written;
  return is_whole && staging_.data[0] == '\xA5' && staging_.data[nbytes - 1] == '\xA5' ? 0 : EIO;
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

void UringBackend::fill(const IoOp& op, io_uring_sqe* entry) const {
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

void UringBackend::fill_transfer(const IoOp& op, io_uring_sqe* entry) const {
  bool is_write = op.kind == IoOp::Kind::kWrite;
  entry->opcode = is_write ? IORING_OP_WRITE : IORING_OP_READ;
  entry->addr = reinterpret_cast<uint64_t>(op.address);
  bool is_staging = op.address >= staging_.data && op.address < staging_.data + staging_.nbytes;
  if (!is_registered_ || !is_staging) return;
  entry->opcode = is_write ? IORING_OP_WRITE_FIXED : IORING_OP_READ_FIXED;
  entry->buf_index = static_cast<uint16_t>((op.address - staging_.data) / buffer_nbytes_);
}

}  // namespace ssdtrain
