#include "read_state.h"

#include <utility>

namespace ssdtrain {

ReadState::ReadState(std::shared_ptr<Monitor> monitor, size_t num_parts)
    : monitor_(std::move(monitor)), num_unfinished_(num_parts) {}

bool ReadState::wait_done(std::chrono::duration<double> timeout) {
  std::unique_lock<std::mutex> lock(monitor_->mutex);
  return changed_.wait_for(lock, timeout, [this] { return is_done(); });
}

std::optional<ReadError> ReadState::error() const {
  std::lock_guard<std::mutex> lock(monitor_->mutex);
  return error_;
}

void ReadState::finish_forwarded(size_t nbytes) {
  forwarded_nbytes_ += nbytes;
  finish();
}

void ReadState::finish_read(size_t nbytes) {
  read_nbytes_ += nbytes;
  monitor_->read_nbytes += nbytes;
  finish();
}

void ReadState::finish_failed(ReadError error) {
  if (!error_) error_ = std::move(error);
  finish();
}

void ReadState::finish() {
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
