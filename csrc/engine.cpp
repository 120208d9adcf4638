#include "engine.h"

#include <algorithm>
#include <stdexcept>
#include <thread>
#include <utility>

#include "read_transfer.h"
#include "thread_backend.h"

namespace ssdtrain {

namespace {

constexpr size_t kPageNbytes = 4096;
constexpr size_t kCoresPerCopyThread = 4;

std::string number(uint64_t value) { return std::to_string(value); }

void check_options(const EngineOptions& options, const Engine::Files& files) {
  if (files.empty()) throw std::invalid_argument("Expected at least one spill file, got none");
  if (options.slab_nbytes == 0 || options.slab_nbytes % kPageNbytes != 0) {
    throw std::invalid_argument("Expected slab_nbytes to be a multiple of 4096, got " +
                                number(options.slab_nbytes));
  }
  if (options.staging_nbytes < options.slab_nbytes) {
    throw std::invalid_argument("Expected staging_nbytes to hold one slab of " +
                                number(options.slab_nbytes) + " bytes, got " +
                                number(options.staging_nbytes));
  }
  if (options.num_threads == 0 || options.queue_depth == 0) {
    throw std::invalid_argument("Expected num_threads and queue_depth of at least 1, got 0");
  }
  for (const std::shared_ptr<SpillFile>& file : files) {
    if (options.slab_nbytes % file->io().block_nbytes == 0) continue;
    throw std::invalid_argument("Expected slab_nbytes to be a multiple of the block size " +
                                number(file->io().block_nbytes) + " of " + file->directory() +
                                ", got " + number(options.slab_nbytes));
  }
}

void check_source(const PieceSource& source, uint64_t expected_from, uint64_t extent_nbytes,
                  size_t block) {
  if (source.nbytes > 0 && source.offset >= expected_from && source.offset % block == 0 &&
      source.offset <= extent_nbytes && source.nbytes <= extent_nbytes - source.offset) {
    return;
  }
  throw std::invalid_argument(
      "Expected pieces of at least one byte, sorted, apart, each at a multiple of " +
      number(block) + " bytes inside the extent of " + number(extent_nbytes) + ", got " +
      number(source.nbytes) + " bytes at " + number(source.offset));
}

void check_sources(const std::vector<PieceSource>& sources, uint64_t extent_nbytes, size_t block) {
  if (sources.empty()) throw std::invalid_argument("Expected at least one piece, got none");
  uint64_t expected_from = 0;
  for (const PieceSource& source : sources) {
    check_source(source, expected_from, extent_nbytes, block);
    expected_from = source.offset + source.nbytes;
  }
}

size_t num_copy_threads(size_t num_threads) {
  size_t cores = std::thread::hardware_concurrency();
  return std::clamp<size_t>(cores / kCoresPerCopyThread, 1, num_threads);
}

size_t round_up(size_t nbytes, size_t block) { return (nbytes + block - 1) / block * block; }

}  // namespace

std::unique_ptr<IoBackend> Engine::open_backend(const EngineOptions& options, StagingSpan staging,
                                                const std::string& directory,
                                                IoBackend::OnComplete on_complete) {
  if (options.kind == "io_uring") {
    return std::make_unique<UringBackend>(options.queue_depth, staging, directory,
                                          std::move(on_complete));
  }
  if (options.kind == "threads") {
    return std::make_unique<ThreadBackend>(options.num_threads, std::move(on_complete));
  }
  throw std::invalid_argument("Expected engine kind 'io_uring' or 'threads', got '" + options.kind +
                              "'");
}

Engine::Engine(Files files, EngineOptions options, const OpenBackend& open)
    : options_(std::move(options)),
      files_(std::move(files)),
      monitor_(std::make_shared<Monitor>()),
      doorbell_(std::make_shared<Doorbell>()) {
  check_options(options_, files_);
  for (const std::shared_ptr<SpillFile>& file : files_) open_files_.push_back(file->open_file());
  pool_ = std::make_shared<SlabPool>(options_.staging_nbytes / options_.slab_nbytes,
                                     options_.slab_nbytes, doorbell_);
  staging_nbytes_ = pool_->nbytes();
  StagingSpan staging{pool_->data(), pool_->nbytes(), pool_->slab_nbytes()};
  BackendFactory factory = [&](IoBackend::OnComplete on_complete) {
    return open(options_, staging, files_[0]->directory(), std::move(on_complete));
  };
  scheduler_ = std::make_unique<Scheduler>(monitor_, factory, options_.queue_depth);
  kind_ = scheduler_->backend().kind();
  has_registered_buffers_ = scheduler_->backend().has_registered_buffers();
  notes_ = scheduler_->backend().notes();
  copier_ =
      std::make_unique<Copier>(monitor_, pool_, doorbell_, scheduler_.get(), options_.has_checksum);
  copier_->start(num_copy_threads(options_.num_threads));
}

Engine::~Engine() { close(); }

void Engine::expect_open() const {
  std::lock_guard<std::mutex> lock(monitor_->mutex);
  check_open();
}

void Engine::check_open() const {
  if (!monitor_->is_closing) return;
  throw std::runtime_error("Expected an open engine, got a closed one; open another engine");
}

void Engine::check_extent(const Extent& extent) const {
  if (extent.file >= files_.size()) {
    throw std::invalid_argument("Expected a file index below " + number(files_.size()) + ", got " +
                                number(extent.file));
  }
  size_t block = open_files_[extent.file]->io.block_nbytes;
  uint64_t limit = files_[extent.file]->nbytes();
  bool is_aligned = extent.offset % block == 0 && extent.nbytes % block == 0;
  bool is_inside = extent.offset <= limit && extent.nbytes <= limit - extent.offset;
  if (is_aligned && is_inside && extent.nbytes > 0) return;
  throw std::invalid_argument("Expected an extent aligned to " + number(block) +
                              " bytes inside the first " + number(limit) + " bytes of file " +
                              number(extent.file) + ", got offset " + number(extent.offset) +
                              ", nbytes " + number(extent.nbytes) + "; grow the spill file first");
}

std::shared_ptr<WriteState> Engine::write(Extent extent, std::vector<PieceSource> sources) {
  std::shared_ptr<WriteState> write;
  {
    std::lock_guard<std::mutex> lock(monitor_->mutex);
    check_open();
    check_extent(extent);
    const std::shared_ptr<const OpenFile>& file = open_files_[extent.file];
    check_sources(sources, extent.nbytes, file->io.block_nbytes);
    write =
        std::make_shared<WriteState>(monitor_, extent, std::move(sources), options_.slab_nbytes);
    ++monitor_->num_pending;
    monitor_->inflight_nbytes += extent.nbytes;
    copier_->enqueue(write, file);
  }
  // One copy thread for one chunk; more would wake for nothing.
  extent.nbytes <= options_.slab_nbytes ? doorbell_->ring_one() : doorbell_->ring_all();
  return write;
}

void Engine::check_destination(const WriteState& write, size_t piece,
                               Destination destination) const {
  const DirectIo& io = open_files_[write.extent().file]->io;
  size_t nbytes = round_up(write.source(piece).nbytes, io.block_nbytes);
  if (destination.capacity < nbytes) {
    throw std::invalid_argument("Expected a capacity of at least " + number(nbytes) +
                                " bytes (the piece in whole blocks), got " +
                                number(destination.capacity));
  }
  if (reinterpret_cast<uintptr_t>(destination.address) % io.memory_alignment != 0) {
    throw std::invalid_argument(
        "Expected an address aligned to memory_alignment=" + number(io.memory_alignment) +
        ", got " + number(reinterpret_cast<uintptr_t>(destination.address)));
  }
}

std::shared_ptr<ReadState> Engine::read(const std::shared_ptr<WriteState>& write, size_t piece,
                                        Destination destination) {
  if (piece >= write->num_pieces()) {
    throw std::invalid_argument("Expected a piece below " + number(write->num_pieces()) + ", got " +
                                number(piece));
  }
  std::shared_ptr<ReadState> read;
  bool has_forwards = false;
  {
    std::lock_guard<std::mutex> lock(monitor_->mutex);
    check_open();
    check_destination(*write, piece, destination);
    if (!write->is_readable(piece)) {
      throw std::runtime_error("Expected piece " + number(piece) +
                               " to be copied and not cancelled, got one that is not; "
                               "wait for is_piece_copied");
    }
    size_t num_parts = write->num_piece_parts(piece);
    read = std::make_shared<ReadState>(monitor_, num_parts);
    ++monitor_->num_pending;
    for (size_t i = 0; i < num_parts; ++i) {
      has_forwards |= add_read(write, write->piece_parts(piece)[i], read, destination.address);
    }
  }
  scheduler_->start();
  if (has_forwards) doorbell_->ring_all();
  return read;
}

bool Engine::add_read(const std::shared_ptr<WriteState>& write, const Part& part,
                      const std::shared_ptr<ReadState>& read, char* address) {
  const Chunk& chunk = write->chunk(part.chunk);
  char* to = address + part.piece_offset;
  if (chunk.bytes) {
    uint64_t file_offset = write->file_offset(part.chunk) + part.chunk_offset;
    copier_->enqueue(
        ForwardJob{read, chunk.bytes, part.chunk_offset, to, part.nbytes, file_offset});
    return true;
  }
  const OpenFile& file = *open_files_[write->extent().file];
  size_t nbytes = round_up(part.nbytes, file.io.block_nbytes);
  ReadTransfer::Source source{write, &part, options_.has_checksum};
  scheduler_->enqueue(
      std::make_unique<ReadTransfer>(monitor_, file, read, std::move(source), to, nbytes));
  return false;
}

bool Engine::wait_inflight(uint64_t max_nbytes, Seconds timeout) {
  std::unique_lock<std::mutex> lock(monitor_->mutex);
  return monitor_->progress.wait_for(lock, timeout,
                                     [&] { return monitor_->inflight_nbytes <= max_nbytes; });
}

bool Engine::wait_idle(Seconds timeout) {
  std::unique_lock<std::mutex> lock(monitor_->mutex);
  return monitor_->progress.wait_for(lock, timeout, [&] { return monitor_->num_pending == 0; });
}

void Engine::close() {
  std::lock_guard<std::mutex> closing(close_mutex_);
  if (std::exchange(is_stopped_, true)) return;
  {
    std::unique_lock<std::mutex> lock(monitor_->mutex);
    monitor_->is_closing = true;
    copier_->cancel_queued();
    scheduler_->cancel_queued();
    monitor_->progress.wait(lock, [&] { return monitor_->num_pending == 0; });
  }
  copier_->stop();
  scheduler_->stop();
  std::lock_guard<std::mutex> lock(monitor_->mutex);
  final_peak_nbytes_ = pool_->peak_nbytes();
  open_files_.clear();
  files_.clear();
  pool_.reset();
}

bool Engine::is_closed() const {
  std::lock_guard<std::mutex> lock(monitor_->mutex);
  return monitor_->is_closing;
}

size_t Engine::staging_in_use_nbytes() const {
  std::lock_guard<std::mutex> lock(monitor_->mutex);
  return pool_ ? pool_->in_use_nbytes() : 0;
}

size_t Engine::peak_staging_nbytes() const {
  std::lock_guard<std::mutex> lock(monitor_->mutex);
  return pool_ ? pool_->peak_nbytes() : final_peak_nbytes_;
}

double Engine::write_busy_seconds() const {
  std::lock_guard<std::mutex> lock(monitor_->mutex);
  return monitor_->write_clock.seconds();
}

double Engine::read_busy_seconds() const {
  std::lock_guard<std::mutex> lock(monitor_->mutex);
  return monitor_->read_clock.seconds();
}

}  // namespace ssdtrain
