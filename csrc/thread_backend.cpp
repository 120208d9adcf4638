#include "thread_backend.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <utility>

namespace ssdtrain {

namespace {

constexpr unsigned kWriteBack =
    SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WRITE | SYNC_FILE_RANGE_WAIT_AFTER;

int64_t execute(const IoOp& op) {
  auto offset = static_cast<off_t>(op.offset);
  auto nbytes = static_cast<off_t>(op.nbytes);
  int64_t result = -1;
  switch (op.kind) {
    case IoOp::Kind::kRead:
      result = ::pread(op.fd, op.address, op.nbytes, offset);
      break;
    case IoOp::Kind::kWrite:
      result = ::pwrite(op.fd, op.address, op.nbytes, offset);
      break;
    case IoOp::Kind::kSync:
      result = ::sync_file_range(op.fd, offset, nbytes, kWriteBack);
      break;
    case IoOp::Kind::kDropCache:
      return -::posix_fadvise(op.fd, offset, nbytes, POSIX_FADV_DONTNEED);
  }
  return result >= 0 ? result : -errno;
}

}  // namespace

ThreadBackend::ThreadBackend(size_t num_threads, OnComplete on_complete)
    : num_threads_(num_threads), on_complete_(std::move(on_complete)) {
  try {
    for (size_t i = 0; i < num_threads; ++i) threads_.spawn("ssdtrain-io", [this] { run(); });
  } catch (...) {
    stop();
    throw;
  }
}

ThreadBackend::~ThreadBackend() { stop(); }

void ThreadBackend::submit(const IoOp& op) {
  std::lock_guard<std::mutex> lock(mutex_);
  queue_.push_back(op);
  // Under the lock: once the operation is done, this object may be on its way out.
  changed_.notify_one();
}

void ThreadBackend::stop() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    is_stopping_ = true;
    changed_.notify_all();
  }
  threads_.join();
}

void ThreadBackend::run() {
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    changed_.wait(lock, [this] { return is_stopping_ || !queue_.empty(); });
    if (queue_.empty()) return;
    IoOp op = queue_.front();
    queue_.pop_front();
    lock.unlock();
    on_complete_(op.context, execute(op));
    lock.lock();
  }
}

}  // namespace ssdtrain
