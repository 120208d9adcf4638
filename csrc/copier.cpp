#include "copier.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "copy_past_cache.h"
#include "crc32c.h"
#include "slab_filler.h"

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

uint32_t copy_without_checksum(char* to, const char* from, size_t nbytes) {
  copy_past_cache(to, from, nbytes);
  return 0;
}

}  // namespace

Copier::Copier(std::shared_ptr<Monitor> monitor, std::shared_ptr<SlabPool> pool,
               std::shared_ptr<Doorbell> doorbell, Scheduler* scheduler, bool has_checksum)
    : monitor_(std::move(monitor)),
      doorbell_(std::move(doorbell)),
      has_checksum_(has_checksum),
      writes_(monitor_, std::move(pool), scheduler) {}

Copier::~Copier() { stop(); }

void Copier::start(size_t num_threads) {
  for (size_t i = 0; i < num_threads; ++i) threads_.spawn("ssdtrain-copy", [this] { run(); });
}

void Copier::stop() {
  is_stopping_ = true;
  doorbell_->ring_all();
  threads_.join();
  writes_.stop();
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
  std::optional<WriteQueue::Job> copy_job;
  bool is_forward;
  {
    std::lock_guard<std::mutex> lock(monitor_->mutex);
    is_forward = take_forward(&forward_job);
    if (!is_forward) copy_job = writes_.take();
  }
  if (is_forward) forward(std::move(forward_job));
  if (copy_job) copy(std::move(*copy_job));
  return is_forward || copy_job;
}

bool Copier::take_forward(ForwardJob* job) {
  if (forwards_.empty()) return false;
  *job = std::move(forwards_.front());
  forwards_.pop_front();
  return true;
}

void Copier::forward(ForwardJob job) {
  std::memcpy(job.destination, job.bytes.get() + job.bytes_offset, job.nbytes);
  job.bytes.reset();  // before the request is seen to be done
  std::lock_guard<std::mutex> lock(monitor_->mutex);
  job.read->count_forwarded(job.nbytes);
  job.read->finish();
}

void Copier::copy(WriteQueue::Job job) {
  fill_slab(job.write.get(), job.chunk, job.bytes.get(),
            has_checksum_ ? copy_with_checksum : copy_without_checksum);
  writes_.finish(std::move(job));
}

void Copier::cancel_queued() {
  writes_.cancel_all();
  for (ForwardJob& job : forwards_) {
    job.read->finish_failed({ECANCELED, job.file_offset, job.nbytes, "the engine was closed"});
  }
  forwards_.clear();
}

}  // namespace ssdtrain
