#include "read_state.h"

#include <utility>

namespace ssdtrain {

ReadState::ReadState(std::shared_ptr<Monitor> monitor, size_t num_parts,
                     std::shared_ptr<Fence> ready)
    : monitor_(std::move(monitor)),
      ready_(std::move(ready)),
      num_unissued_(num_parts),
      num_unfinished_(num_parts) {
  moments_.queued = seconds_now();
}

bool ReadState::wait_done(std::chrono::duration<double> timeout) {
  std::unique_lock<std::mutex> lock(monitor_->mutex);
  await();
  return changed_.wait_for(lock, timeout, [this] { return is_done(); });
}

bool ReadState::wait_issued(std::chrono::duration<double> timeout) {
  std::unique_lock<std::mutex> lock(monitor_->mutex);
  await();
  return changed_.wait_for(lock, timeout, [this] { return is_issued(); });
}

void ReadState::expedite() {
  std::lock_guard<std::mutex> lock(monitor_->mutex);
  await();
}

void ReadState::await() {
  if (is_awaited_ || is_done()) return;
  is_awaited_ = true;
  ++monitor_->num_awaited;
}

void ReadState::make_wait(DeviceDriver::Stream stream) const {
  std::shared_ptr<Fence> last;
  {
    std::lock_guard<std::mutex> lock(monitor_->mutex);
    last = last_copy_;
  }
  if (last) last->make_wait(stream);
}

std::optional<ReadError> ReadState::error() const {
  std::lock_guard<std::mutex> lock(monitor_->mutex);
  return error_;
}

ReadMoments ReadState::moments() const {
  std::lock_guard<std::mutex> lock(monitor_->mutex);
  return moments_;
}

void ReadState::note_begun() {
  if (moments_.read_begun == 0.0) moments_.read_begun = seconds_now();
}

void ReadState::note_issued(std::shared_ptr<Fence> there) {
  last_copy_ = std::move(there);
  mark_issued();
}

void ReadState::mark_issued() {
  if (--num_unissued_ > 0) return;
  ++monitor_->num_events;
  changed_.notify_all();
}

void ReadState::count_forwarded(size_t nbytes) { forwarded_nbytes_ += nbytes; }

void ReadState::count_read(size_t nbytes) { read_nbytes_ += nbytes; }

void ReadState::finish_failed(ReadError error, bool was_issued) {
  if (!error_) error_ = std::move(error);
  if (!was_issued) mark_issued();
  finish();
}

void ReadState::finish() {
  if (num_unfinished_ > 1) {
    --num_unfinished_;
    return;
  }
  moments_.done = seconds_now();
  --monitor_->num_pending;
  if (is_awaited_) --monitor_->num_awaited;
  num_unfinished_ = 0;
  ++monitor_->num_events;
  changed_.notify_all();
  monitor_->progress.notify_all();
}

}  // namespace ssdtrain
