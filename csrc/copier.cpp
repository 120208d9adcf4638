#include "copier.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "copy_past_cache.h"
#include "crc32c.h"
#include "write_transfer.h"

namespace ssdtrain {

namespace {

constexpr size_t kCacheNbytes = size_t{128} << 10;

// Copies through the cache in steps, so that the checksum reads what the copy just touched.
uint32_t copy_with_checksum(char* to, const char* from, size_t nbytes) {
  uint32_t checksum = 0;
  for (size_t at = 0; at < nbytes; at += kCacheNbytes) {
    size_t step = std::min(kCacheNbytes, nbytes - at);
    std::memcpy(to + at, from + at, step);
    checksum = crc32c(checksum, to + at, step);
  }
  return checksum;
}

// Fills the slab with the chunk: its parts, and zeros where there are none, so that nothing of an
// earlier tenant reaches the file.
void fill_slab(WriteState* write, size_t index, char* slab, bool has_checksum) {
  const Chunk& chunk = write->chunk(index);
  Part* parts = write->chunk_parts(index);
  size_t filled = 0;
  for (size_t i = 0; i < chunk.num_parts; ++i) {
    Part& part = parts[i];
    if (part.is_skipped) continue;
    std::memset(slab + filled, 0, part.chunk_offset - filled);
    char* to = slab + part.chunk_offset;
    const char* from = write->source(part.piece).address + part.piece_offset;
    if (has_checksum) part.checksum = copy_with_checksum(to, from, part.nbytes);
    if (!has_checksum) copy_past_cache(to, from, part.nbytes);
    filled = part.chunk_offset + part.nbytes;
  }
  std::memset(slab + filled, 0, chunk.nbytes - filled);
}

}  // namespace

Copier::Copier(std::shared_ptr<Monitor> monitor, std::shared_ptr<SlabPool> pool,
               std::shared_ptr<Doorbell> doorbell, Scheduler* scheduler, bool has_checksum)
    : monitor_(std::move(monitor)),
      pool_(std::move(pool)),
      doorbell_(std::move(doorbell)),
      scheduler_(scheduler),
      has_checksum_(has_checksum) {}

Copier::~Copier() { stop(); }

void Copier::start(size_t num_threads) {
  for (size_t i = 0; i < num_threads; ++i) threads_.spawn("ssdtrain-copy", [this] { run(); });
}

void Copier::stop() {
  is_stopping_ = true;
  doorbell_->ring_all();
  threads_.join();
  pool_.reset();
}

void Copier::run() {
  while (!is_stopping_) {
    uint64_t epoch = doorbell_->epoch();
    if (is_stopping_) return;
    if (!run_one()) doorbell_->wait(epoch);
  }
}

bool Copier::run_one() {
  ForwardJob forward_job;
  CopyJob copy_job;
  bool is_forward;
  {
    std::lock_guard<std::mutex> lock(monitor_->mutex);
    is_forward = take_forward(&forward_job);
    if (!is_forward && !take_copy(&copy_job)) return false;
  }
  if (is_forward) forward(std::move(forward_job));
  if (!is_forward) copy(std::move(copy_job));
  return true;
}

bool Copier::take_forward(ForwardJob* job) {
  if (forwards_.empty()) return false;
  *job = std::move(forwards_.front());
  forwards_.pop_front();
  return true;
}

bool Copier::take_copy(CopyJob* job) {
  while (!writes_.empty()) {
    QueuedWrite& front = writes_.front();
    std::optional<size_t> chunk = front.write->next_queued();
    if (!chunk) {
      writes_.pop_front();
      continue;
    }
    SlabLease lease = pool_->try_lease();
    if (!lease) return false;
    auto owner = std::make_shared<SlabLease>(std::move(lease));
    std::shared_ptr<char> slab(owner, owner->data());
    front.write->begin_copy(*chunk, slab);
    *job = {front, *chunk, std::move(slab)};
    return true;
  }
  return false;
}

void Copier::forward(ForwardJob job) {
  std::memcpy(job.destination, job.bytes.get() + job.bytes_offset, job.nbytes);
  job.bytes.reset();  // before the request is seen to be done
  std::lock_guard<std::mutex> lock(monitor_->mutex);
  job.read->finish_forwarded(job.nbytes);
}

void Copier::copy(CopyJob job) {
  WriteState& write = *job.target.write;
  char* slab = job.slab.get();
  fill_slab(&write, job.chunk, slab, has_checksum_);
  job.slab.reset();  // the chunk's own reference decides from here on
  {
    std::lock_guard<std::mutex> lock(monitor_->mutex);
    if (monitor_->is_closing) write.cancel_all();
    if (!write.end_copy(job.chunk)) return;
    scheduler_->enqueue(std::make_unique<WriteTransfer>(monitor_, *job.target.file,
                                                        job.target.write, job.chunk, slab));
  }
  scheduler_->start();
}

void Copier::cancel_queued() {
  for (QueuedWrite& queued : writes_) queued.write->cancel_all();
  writes_.clear();
  for (ForwardJob& job : forwards_) {
    job.read->finish_failed({ECANCELED, job.file_offset, job.nbytes, "the engine was closed"});
  }
  forwards_.clear();
}

}  // namespace ssdtrain
