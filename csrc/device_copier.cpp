#include "device_copier.h"

#include <algorithm>
#include <cerrno>
#include <exception>
#include <utility>

#include "crc32c.h"
#include "slab_filler.h"

namespace ssdtrain {

namespace {

size_t round_up(size_t nbytes, size_t block) { return (nbytes + block - 1) / block * block; }

// From the file to a slab; the slab then goes on to the device.
class StagedTransfer : public ReadTransfer {
 public:
  StagedTransfer(std::shared_ptr<Monitor> monitor, const OpenFile& file, Source source, CopyIn next,
                 DeviceCopier* copier)
      : ReadTransfer(std::move(monitor), file, next.read, std::move(source),
                     const_cast<char*>(next.bytes.get()), next.file_nbytes),
        next_(std::move(next)),
        copier_(copier) {}

  void finish() override {
    if (errnum() != 0) {
      next_.bytes.reset();
      ReadTransfer::finish();
      return;
    }
    next_.read->count_read(next_.file_nbytes);
    copier_->enqueue(std::move(next_));
  }

 private:
  CopyIn next_;
  DeviceCopier* const copier_;
};

// After an error: what was queued on `stream` before it may still run.
void drain(const std::shared_ptr<DeviceDriver>& driver, DeviceDriver::Stream stream) {
  try {
    Fence(driver, stream).synchronize();
  } catch (const std::exception&) {
    // The stream runs nothing any more.
  }
}

}  // namespace

void FenceWatcher::start(const char* name) {
  thread_.spawn(name, [this] { run(); });
}

void FenceWatcher::push(std::vector<std::shared_ptr<Fence>> needed, std::shared_ptr<Fence> fence,
                        Done done) {
  std::lock_guard<std::mutex> lock(mutex_);
  queue_.push_back({std::move(needed), std::move(fence), std::move(done), seconds_now()});
  changed_.notify_one();
}

void FenceWatcher::stop() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    is_stopping_ = true;
    changed_.notify_one();
  }
  thread_.join();
}

// When the last of what it needs was there; what was there before anybody looked says nothing.
double FenceWatcher::wait_until_ready(const Watched& next) {
  double ready = next.queued;
  try {
    for (const std::shared_ptr<Fence>& needed : next.needed) {
      if (needed == nullptr || needed->is_complete()) continue;
      needed->synchronize();
      ready = seconds_now();
    }
  } catch (const std::exception&) {
    // Only the time is not known; what went wrong the fence of the copy says.
  }
  return ready;
}

void FenceWatcher::run() {
  double ended = 0.0;
  for (;;) {
    Watched next;
    {
      std::unique_lock<std::mutex> lock(mutex_);
      changed_.wait(lock, [&] { return is_stopping_ || !queue_.empty(); });
      if (queue_.empty()) return;
      next = std::move(queue_.front());
      queue_.pop_front();
    }
    std::string error;
    double began = std::max(ended, wait_until_ready(next));
    try {
      next.fence->synchronize();
    } catch (const std::exception& thrown) {
      error = thrown.what();
    }
    ended = seconds_now();
    next.done(error, ended - began);
  }
}

DeviceCopier::DeviceCopier(Shared shared, std::shared_ptr<DeviceDriver> driver)
    : shared_(std::move(shared)),
      driver_(std::move(driver)),
      doorbell_(std::make_shared<Doorbell>()),
      writes_(shared_.monitor, shared_.pool, shared_.scheduler) {}

void DeviceCopier::start() {
  out_watcher_.start("ssdtrain-out");
  in_watcher_.start("ssdtrain-in");
  thread_.spawn("ssdtrain-device", [this] { run(); });
}

void DeviceCopier::stop() {
  is_stopping_ = true;
  doorbell_->ring_all();
  thread_.join();
  out_watcher_.stop();
  in_watcher_.stop();
}

void DeviceCopier::enqueue(std::shared_ptr<WriteState> write, WriteTarget target) {
  writes_.push(std::move(write), std::move(target));
  doorbell_->ring_all();
}

void DeviceCopier::enqueue(CopyIn job) {
  copies_in_.push_back(std::move(job));
  doorbell_->ring_all();
}

void DeviceCopier::enqueue(std::shared_ptr<ReadState> read, ReadTransfer::Source source,
                           const OpenFile& file, uint64_t destination) {
  reads_.push_back({std::move(read), std::move(source), &file, destination});
  doorbell_->ring_all();
}

void DeviceCopier::run() {
  while (!is_stopping_) {
    uint64_t epoch = doorbell_->epoch();
    if (is_stopping_) return;
    if (!run_one()) doorbell_->wait(epoch);
  }
}

// What backward waits for comes first.
bool DeviceCopier::run_one() {
  std::unique_lock<std::mutex> lock(shared_.monitor->mutex);
  if (!copies_in_.empty()) {
    CopyIn job = std::move(copies_in_.front());
    copies_in_.pop_front();
    lock.unlock();
    issue(std::move(job));
    return true;
  }
  SlabLease lease = reads_.empty() ? SlabLease() : shared_.pool->try_lease(SlabPool::For::kRead);
  if (lease) {
    stage(std::move(lease));
    lock.unlock();
    shared_.scheduler->start();
    return true;
  }
  std::optional<WriteQueue::Job> job = writes_.take();
  lock.unlock();
  if (job) issue(std::move(*job));
  return job.has_value();
}

void DeviceCopier::stage(SlabLease lease) {
  auto first = first_awaited(reads_, *shared_.monitor,
                             [](const StagedRead& read) { return read.read->is_awaited(); });
  StagedRead next = std::move(*first);
  reads_.erase(first);
  const Part& part = *next.source.part;
  size_t nbytes = round_up(part.nbytes, next.file->io.block_nbytes);
  uint64_t file_offset = next.source.write->file_offset(part.chunk) + part.chunk_offset;
  CopyIn copy{std::move(next.read),
              std::move(lease).share(),
              nullptr,
              0,
              next.destination,
              part.nbytes,
              file_offset,
              nbytes};
  shared_.scheduler->enqueue(std::make_unique<StagedTransfer>(
      shared_.monitor, *next.file, std::move(next.source), std::move(copy), this));
}

void DeviceCopier::fail(const CopyIn& job, const std::string& error, bool was_issued) {
  job.read->finish_failed({EREMOTEIO, job.file_offset, job.nbytes, "copy to the device: " + error},
                          was_issued);
}

void DeviceCopier::issue(CopyIn job) {
  std::shared_ptr<Fence> there;
  try {
    job.read->ready()->make_wait(driver_->in_stream());
    if (job.available) job.available->make_wait(driver_->in_stream());
    const char* from = job.bytes.get() + job.bytes_offset;
    for_each_copy(from, job.nbytes, [&](size_t at, size_t nbytes) {
      driver_->copy_in(driver_->in_stream(), job.destination + at, from + at, nbytes);
    });
    there = std::make_shared<Fence>(driver_, driver_->in_stream());
  } catch (const std::exception& thrown) {
    std::string error = thrown.what();
    drain(driver_, driver_->in_stream());  // what was queued of it may still run
    std::lock_guard<std::mutex> lock(shared_.monitor->mutex);
    fail(job, error, false);
    return;
  }
  {
    std::lock_guard<std::mutex> lock(shared_.monitor->mutex);
    if (job.file_nbytes == 0) job.read->count_forwarded(job.nbytes);
    job.read->note_issued(there);
  }
  std::shared_ptr<Fence> ready = job.read->ready();
  in_watcher_.push({ready, job.available}, there,
                   [this, job = std::move(job)](const std::string& error, double seconds) mutable {
                     if (!error.empty()) drain(driver_, driver_->in_stream());
                     job.bytes.reset();  // before the request is seen to be done
                     std::lock_guard<std::mutex> lock(shared_.monitor->mutex);
                     if (error.empty()) {
                       shared_.monitor->copied_in.add(job.nbytes, seconds);
                       job.read->finish();
                     } else {
                       fail(job, error, true);
                     }
                   });
}

std::shared_ptr<Fence> DeviceCopier::queue_copies(const WriteQueue::Job& job) {
  DeviceDriver::Stream stream = driver_->out_stream();
  job.write->producer()->make_wait(stream);
  fill_slab(job.write.get(), job.chunk, job.bytes.get(),
            [&](char* to, const char* from, size_t nbytes) {
              uint64_t source = reinterpret_cast<uint64_t>(from);
              for_each_copy(to, nbytes, [&](size_t at, size_t step) {
                driver_->copy_out(stream, to + at, source + at, step);
              });
              return uint32_t{0};
            });
  return std::make_shared<Fence>(driver_, stream);
}

void DeviceCopier::issue(WriteQueue::Job job) {
  std::shared_ptr<Fence> copied;
  try {
    copied = queue_copies(job);
  } catch (const std::exception&) {
    drain(driver_, driver_->out_stream());  // the slab must not be another's meanwhile
    writes_.fail(std::move(job), EREMOTEIO);
    return;
  }
  {
    std::lock_guard<std::mutex> lock(shared_.monitor->mutex);
    job.write->note_issued(job.chunk, copied);
  }
  std::shared_ptr<Fence> producer = job.write->producer();
  out_watcher_.push({producer}, copied,
                    [this, job = std::move(job)](const std::string& error, double seconds) mutable {
                      if (!error.empty()) {
                        drain(driver_, driver_->out_stream());
                        writes_.fail(std::move(job), EREMOTEIO);
                        return;
                      }
                      note_copied_out(job, seconds);
                      if (shared_.has_checksum) add_checksums(job);
                      writes_.finish(std::move(job));
                    });
}

void DeviceCopier::note_copied_out(const WriteQueue::Job& job, double seconds) {
  size_t nbytes = 0;
  const Part* parts = job.write->chunk_parts(job.chunk);
  for (size_t i = 0; i < job.write->chunk(job.chunk).num_parts; ++i) {
    if (!parts[i].is_skipped) nbytes += parts[i].nbytes;
  }
  std::lock_guard<std::mutex> lock(shared_.monitor->mutex);
  shared_.monitor->copied_out.add(nbytes, seconds);
}

void DeviceCopier::add_checksums(const WriteQueue::Job& job) {
  const Chunk& chunk = job.write->chunk(job.chunk);
  Part* parts = job.write->chunk_parts(job.chunk);
  for (size_t i = 0; i < chunk.num_parts; ++i) {
    if (parts[i].is_skipped) continue;
    parts[i].checksum = crc32c(0, job.bytes.get() + parts[i].chunk_offset, parts[i].nbytes);
  }
}

void DeviceCopier::cancel_queued() {
  writes_.cancel_all();
  for (StagedRead& staged : reads_) {
    uint64_t offset = staged.source.write->file_offset(staged.source.part->chunk);
    staged.read->finish_failed(
        {ECANCELED, offset, staged.source.part->nbytes, "the engine was closed"});
  }
  reads_.clear();
  for (CopyIn& job : copies_in_) {
    job.read->finish_failed({ECANCELED, job.file_offset, job.nbytes, "the engine was closed"});
  }
  copies_in_.clear();
}

}  // namespace ssdtrain
