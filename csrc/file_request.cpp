#include "file_request.h"

#include <cerrno>
#include <utility>

namespace ssdtrain {

FileRequest::FileRequest(std::shared_ptr<Monitor> monitor, bool is_write, uint64_t offset,
                         size_t num_parts)
    : monitor_(std::move(monitor)),
      is_write_(is_write),
      offset_(offset),
      num_unfinished_(num_parts) {}

bool FileRequest::wait_done(std::chrono::duration<double> timeout) {
  if (is_done()) return true;
  std::unique_lock<std::mutex> lock(monitor_->mutex);
  return changed_.wait_for(lock, timeout, [this] { return is_done(); });
}

std::optional<FileError> FileRequest::error() const {
  std::lock_guard<std::mutex> lock(monitor_->mutex);
  return error_;
}

void FileRequest::finish_failed(uint64_t offset, int errnum, std::string message) {
  uint64_t moved_nbytes = offset - offset_;
  if (!error_ || moved_nbytes < error_->moved_nbytes) {
    error_ = FileError{errnum, moved_nbytes, std::move(message)};
  }
  if (errnum != ECANCELED) ++(is_write_ ? monitor_->num_write_errors : monitor_->num_read_errors);
  finish();
}

void FileRequest::finish() {
  if (num_unfinished_ > 1) {
    --num_unfinished_;
    return;
  }
  --monitor_->num_pending;
  num_unfinished_ = 0;
  ++monitor_->num_events;
  changed_.notify_all();
  monitor_->progress.notify_all();
}

}  // namespace ssdtrain
