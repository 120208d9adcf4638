#include "scheduler.h"

#include <algorithm>
#include <utility>

namespace ssdtrain {

Scheduler::Scheduler(std::shared_ptr<Monitor> monitor, const BackendFactory& open_backend,
                     size_t max_depth)
    : monitor_(std::move(monitor)),
      backend_(open_backend([this](void* context, int64_t result) {
        complete(static_cast<Transfer*>(context), result);
      })),
      depth_(std::min(max_depth, backend_->depth())) {}

void Scheduler::enqueue(std::unique_ptr<Transfer> transfer) {
  Queue& queue = transfer->is_write() ? writes_ : reads_;
  queue.push_back(std::move(transfer));
}

void Scheduler::start() {
  std::vector<Transfer*> startable;
  {
    std::lock_guard<std::mutex> lock(monitor_->mutex);
    startable = take_startable();
  }
  submit(startable);
}

void Scheduler::submit(const std::vector<Transfer*>& transfers) {
  for (Transfer* transfer : transfers) {
    transfer->prepare();
    backend_->submit(transfer->op());
  }
}

std::vector<Transfer*> Scheduler::take_startable() {
  std::vector<Transfer*> startable;
  while (num_active_ < depth_) {
    std::unique_ptr<Transfer> transfer = next(&reads_);
    if (!transfer) transfer = next(&writes_);
    if (!transfer) break;
    begin(*transfer);
    startable.push_back(transfer.release());  // the backend's context owns it until complete()
  }
  return startable;
}

std::unique_ptr<Transfer> Scheduler::next(Queue* queue) {
  while (!queue->empty()) {
    auto first = first_awaited(*queue, *monitor_, [](const auto& t) { return t->is_awaited(); });
    std::unique_ptr<Transfer> transfer = std::move(*first);
    queue->erase(first);
    if (transfer->begin()) return transfer;
  }
  return nullptr;
}

void Scheduler::complete(Transfer* context, int64_t result) {
  if (context->advance(result, monitor_.get()) == Transfer::Outcome::kAgain) {
    {
      std::lock_guard<std::mutex> lock(monitor_->mutex);
      context->pulse().answer();
    }
    backend_->submit(context->op());
    return;
  }
  std::unique_ptr<Transfer> transfer(context);
  transfer->settle();
  std::vector<Transfer*> startable;
  {
    std::lock_guard<std::mutex> lock(monitor_->mutex);
    end(*transfer);
    transfer->finish();
    transfer.reset();
    startable = take_startable();
  }
  submit(startable);
}

void Scheduler::cancel_queued() {
  for (Queue* queue : {&reads_, &writes_}) {
    for (std::unique_ptr<Transfer>& transfer : *queue) transfer->cancel();
    queue->clear();
  }
}

void Scheduler::begin(const Transfer& transfer) {
  ++num_active_;
  transfer.pulse().begin();
  for (Traffic* traffic : {&monitor_->total, &monitor_->traffic[transfer.user()]}) {
    (transfer.is_write() ? traffic->written : traffic->read).begin();
  }
}

void Scheduler::end(const Transfer& transfer) {
  --num_active_;
  transfer.pulse().end();
  size_t nbytes = transfer.errnum() == 0 ? transfer.nbytes() : 0;
  for (Traffic* traffic : {&monitor_->total, &monitor_->traffic[transfer.user()]}) {
    (transfer.is_write() ? traffic->written : traffic->read).end(nbytes);
  }
  (transfer.is_write() ? monitor_->written_nbytes : monitor_->read_nbytes) += nbytes;
}

}  // namespace ssdtrain
