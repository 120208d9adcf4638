#pragma once

#include <deque>
#include <memory>
#include <vector>

#include "io_backend.h"
#include "monitor.h"
#include "transfer.h"

namespace ssdtrain {

// Decides which transfer the backend gets next: reads that somebody waits for, other reads, writes,
// each in order, never more than the backend's depth; and counts what they did. Keeps what waits
// out of the backend's hands, so that it can be cancelled.
class Scheduler {
 public:
  Scheduler(std::shared_ptr<Monitor> monitor, const BackendFactory& open_backend, size_t max_depth);

  const IoBackend& backend() const { return *backend_; }
  // monitor->mutex held; start() must follow once it is released.
  void enqueue(std::unique_ptr<Transfer> transfer);
  // monitor->mutex not held.
  void start();
  // monitor->mutex held: gives up what has not begun.
  void cancel_queued();
  // Nothing in flight.
  void stop() { backend_->stop(); }

 private:
  using Queue = std::deque<std::unique_ptr<Transfer>>;

  void complete(Transfer* transfer, int64_t result);
  std::vector<Transfer*> take_startable();
  void submit(const std::vector<Transfer*>& transfers);
  std::unique_ptr<Transfer> next(Queue* queue);
  void begin(const Transfer& transfer);
  void end(const Transfer& transfer);

  const std::shared_ptr<Monitor> monitor_;
  Queue reads_;
  Queue writes_;
  size_t num_active_ = 0;
  std::unique_ptr<IoBackend> backend_;
  const size_t depth_;
};

}  // namespace ssdtrain
