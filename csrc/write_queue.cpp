#include "write_queue.h"

#include <utility>

#include "write_transfer.h"

namespace ssdtrain {

std::optional<WriteQueue::Job> WriteQueue::take() {
  while (!writes_.empty()) {
    const Job& front = writes_.front();
    std::optional<size_t> chunk = front.write->next_queued();
    if (!chunk) {
      writes_.pop_front();
      continue;
    }
    std::shared_ptr<char> bytes = memory_for(front, *chunk);
    if (!bytes) return std::nullopt;
    front.write->begin_copy(*chunk, bytes);
    return Job{front.write, front.target, *chunk, std::move(bytes)};
  }
  return std::nullopt;
}

std::shared_ptr<char> WriteQueue::memory_for(const Job& front, size_t chunk) {
  if (front.target.host) {
    char* address = front.target.host->data() + front.write->file_offset(chunk);
    return std::shared_ptr<char>(front.target.host, address);
  }
  SlabLease lease = pool_->try_lease(SlabPool::For::kWrite);
  return lease ? std::move(lease).share() : nullptr;
}

void WriteQueue::cancel_all() {
  for (Job& queued : writes_) queued.write->cancel_all();
  writes_.clear();
}

void WriteQueue::finish(Job job) {
  char* bytes = job.bytes.get();
  job.bytes.reset();  // the chunk's own reference decides from here on
  {
    std::lock_guard<std::mutex> lock(monitor_->mutex);
    if (monitor_->is_closing) job.write->cancel_all();
    if (!job.write->end_copy(job.chunk)) return;
    if (job.target.host) {
      job.write->settle_in_memory(job.chunk);
      return;
    }
    scheduler_->enqueue(std::make_unique<WriteTransfer>(monitor_, *job.target.file, job.write,
                                                        job.chunk, bytes));
  }
  scheduler_->start();
}

void WriteQueue::fail(Job job, int errnum) {
  job.bytes.reset();
  std::lock_guard<std::mutex> lock(monitor_->mutex);
  job.write->fail_copy(job.chunk, errnum);
}

}  // namespace ssdtrain
