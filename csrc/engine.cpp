#include "engine.h"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <stdexcept>
#include <thread>
#include <utility>

#include "file_transfer.h"
#include "read_transfer.h"
#include "thread_backend.h"

namespace ssdtrain {

namespace {

constexpr size_t kPageNbytes = 4096;
constexpr size_t kCoresPerCopyThread = 4;
constexpr size_t kHostBlockNbytes = 512;  // extents of the host tier, as of most files

std::string number(uint64_t value) { return std::to_string(value); }

void check_options(const EngineOptions& options, const Engine::Files& files) {
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
                                                const ProbeFile& probe,
                                                IoBackend::OnComplete on_complete) {
  if (options.kind == "io_uring") {
    return std::make_unique<UringBackend>(options.queue_depth, staging, probe,
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
  size_t num_slabs = options_.staging_nbytes / options_.slab_nbytes;
  size_t num_usable = options_.first_staging_nbytes / options_.slab_nbytes;
  num_usable = num_usable == 0 ? num_slabs : std::min(num_usable, num_slabs);
  pool_ = std::make_shared<SlabPool>(num_slabs, num_usable, options_.slab_nbytes, doorbell_);
  staging_nbytes_ = pool_->nbytes();
  StagingSpan staging{pool_->data(), pool_->nbytes(), pool_->slab_nbytes()};
  BackendFactory factory = [&](IoBackend::OnComplete on_complete) {
    if (files_.empty()) {
      UniqueFd memory(::memfd_create("ssdtrain-probe", MFD_CLOEXEC));
      return open(options_, staging, {memory.get(), kPageNbytes, "memory"}, std::move(on_complete));
    }
    const OpenFile& file = *open_files_[0];
    ProbeFile probe{file.fd.get(), file.io.block_nbytes, files_[0]->directory()};
    return open(options_, staging, probe, std::move(on_complete));
  };
  scheduler_ = std::make_unique<Scheduler>(monitor_, factory, options_.queue_depth);
  kind_ = scheduler_->backend().kind();
  has_registered_buffers_ = scheduler_->backend().has_registered_buffers();
  notes_ = scheduler_->backend().notes();
  copier_ =
      std::make_unique<Copier>(monitor_, pool_, doorbell_, scheduler_.get(), options_.has_checksum);
  copier_->start(num_copy_threads(options_.num_threads));
  if (options_.host_nbytes > 0) {
    host_ = std::make_shared<PinnedRegion>(options_.host_nbytes, MappedRegion::Kind::kAddresses);
  }
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

std::string Engine::add_device(std::shared_ptr<DeviceDriver> driver) {
  DeviceCopier::Shared shared{monitor_, pool_, scheduler_.get(), options_.has_checksum, host_};
  auto copier = std::make_unique<DeviceCopier>(std::move(shared), driver);
  std::string reason = pool_->add_driver(driver, copier->doorbell());
  if (host_) reason += host_->add_driver(driver);
  copier->start();
  std::lock_guard<std::mutex> lock(monitor_->mutex);
  check_open();
  devices_.emplace(driver.get(), std::move(copier));
  return reason;
}

std::string Engine::grow_staging(size_t nbytes) {
  std::shared_ptr<SlabPool> pool;
  {
    std::lock_guard<std::mutex> lock(monitor_->mutex);
    check_open();
    pool = pool_;
  }
  return pool->grow(nbytes / options_.slab_nbytes);
}

std::string Engine::grow_host(size_t nbytes) {
  std::shared_ptr<PinnedRegion> host;
  {
    std::lock_guard<std::mutex> lock(monitor_->mutex);
    check_open();
    host = host_;
  }
  size_t limit = host ? host->limit_nbytes() : 0;
  if (nbytes > limit) {
    throw std::invalid_argument("Expected at most " + number(limit) + " bytes of host tier, got " +
                                number(nbytes));
  }
  return host->grow(nbytes);
}

DeviceCopier* Engine::device_copier(const Fence* fence) const {
  if (fence == nullptr) return nullptr;
  auto found = devices_.find(fence->driver());
  if (found != devices_.end()) return found->second.get();
  throw std::invalid_argument("Expected the fence of a device that was added, got another's");
}

size_t Engine::block_nbytes(size_t file) const {
  return is_host(file) ? kHostBlockNbytes : open_files_[file]->io.block_nbytes;
}

void Engine::check_extent(const Extent& extent) const {
  if (extent.file >= files_.size() && !is_host(extent.file)) {
    throw std::invalid_argument("Expected a file index below " + number(files_.size()) + ", got " +
                                number(extent.file));
  }
  size_t block = block_nbytes(extent.file);
  uint64_t limit = is_host(extent.file) ? host_->nbytes() : files_[extent.file]->nbytes();
  bool is_aligned = extent.offset % block == 0 && extent.nbytes % block == 0;
  bool is_inside = extent.offset <= limit && extent.nbytes <= limit - extent.offset;
  if (is_aligned && is_inside && extent.nbytes > 0) return;
  throw std::invalid_argument("Expected an extent aligned to " + number(block) +
                              " bytes inside the first " + number(limit) + " bytes of file " +
                              number(extent.file) + ", got offset " + number(extent.offset) +
                              ", nbytes " + number(extent.nbytes) + "; grow the spill file first");
}

std::shared_ptr<WriteState> Engine::write(Extent extent, std::vector<PieceSource> sources,
                                          std::shared_ptr<Fence> producer) {
  std::shared_ptr<WriteState> write;
  {
    std::lock_guard<std::mutex> lock(monitor_->mutex);
    check_open();
    check_extent(extent);
    check_sources(sources, extent.nbytes, block_nbytes(extent.file));
    DeviceCopier* device = device_copier(producer.get());
    WriteTarget target;
    if (is_host(extent.file)) target.host = host_;
    if (!is_host(extent.file)) target.file = open_files_[extent.file];
    write = std::make_shared<WriteState>(monitor_, extent, std::move(sources), options_.slab_nbytes,
                                         std::move(producer));
    ++monitor_->num_pending;
    monitor_->inflight_nbytes += extent.nbytes;
    if (device != nullptr) {
      device->enqueue(write, std::move(target));
      return write;
    }
    copier_->enqueue(write, std::move(target));
  }
  // One copy thread for one chunk; more would wake for nothing.
  extent.nbytes <= options_.slab_nbytes ? doorbell_->ring_one() : doorbell_->ring_all();
  return write;
}

void Engine::check_destination(const WriteState& write, size_t piece,
                               const Destination& destination) const {
  bool is_exact = destination.ready || is_host(write.extent().file);
  size_t block = is_exact ? 1 : block_nbytes(write.extent().file);
  size_t nbytes = round_up(write.source(piece).nbytes, block);
  if (destination.capacity < nbytes) {
    throw std::invalid_argument("Expected a capacity of at least " + number(nbytes) +
                                " bytes (the piece in whole blocks), got " +
                                number(destination.capacity));
  }
  size_t alignment = is_exact ? 1 : open_files_[write.extent().file]->io.memory_alignment;
  if (reinterpret_cast<uintptr_t>(destination.address) % alignment != 0) {
    throw std::invalid_argument(
        "Expected an address aligned to memory_alignment=" + number(alignment) + ", got " +
        number(reinterpret_cast<uintptr_t>(destination.address)));
  }
}

std::shared_ptr<ReadState> Engine::read(const std::shared_ptr<WriteState>& write, size_t piece,
                                        const Destination& destination) {
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
    device_copier(destination.ready.get());
    if (!write->is_readable(piece)) {
      throw std::runtime_error("Expected piece " + number(piece) +
                               " to be copied and not cancelled, got one that is not; "
                               "wait for is_piece_copied");
    }
    size_t num_parts = write->num_piece_parts(piece);
    read = std::make_shared<ReadState>(monitor_, num_parts, destination.ready);
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
  uint64_t file_offset = write->file_offset(part.chunk) + part.chunk_offset;
  if (chunk.state == ChunkState::kFailed && !chunk.bytes) {
    read->finish_failed(
        {EREMOTEIO, file_offset, part.nbytes, "it could not be copied from the device"});
    return false;
  }
  if (read->ready()) {
    add_device_read(write, part, read, to);
    return false;
  }
  if (chunk.bytes) {
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

void Engine::add_device_read(const std::shared_ptr<WriteState>& write, const Part& part,
                             const std::shared_ptr<ReadState>& read, char* address) {
  const Chunk& chunk = write->chunk(part.chunk);
  DeviceCopier* device = device_copier(read->ready().get());
  uint64_t to = reinterpret_cast<uint64_t>(address);
  if (chunk.bytes) {
    uint64_t file_offset = write->file_offset(part.chunk) + part.chunk_offset;
    device->enqueue(CopyIn{read, chunk.bytes, chunk.copied, part.chunk_offset, to, part.nbytes,
                           file_offset, 0});
    return;
  }
  ReadTransfer::Source source{write, &part, options_.has_checksum};
  device->enqueue(read, std::move(source), *open_files_[write->extent().file], to);
}

namespace {

// A range cut into what one transfer moves.
struct FilePart {
  uint64_t offset;
  size_t nbytes;
  bool is_direct;
};

void add_parts(std::vector<FilePart>* parts, uint64_t from, uint64_t to, size_t step, bool direct) {
  for (uint64_t at = from; at < to; at += step) {
    parts->push_back({at, static_cast<size_t>(std::min<uint64_t>(step, to - at)), direct});
  }
}

// See [Note: edges].
std::vector<FilePart> parts_of(uint64_t offset, size_t nbytes, size_t step, size_t unit,
                               bool is_direct) {
  std::vector<FilePart> parts;
  uint64_t end = offset + nbytes;
  uint64_t first = (offset + unit - 1) / unit * unit;
  uint64_t last = end / unit * unit;
  if (!is_direct || first >= last) {
    add_parts(&parts, offset, end, step, false);
    return parts;
  }
  add_parts(&parts, offset, first, step, false);
  add_parts(&parts, first, last, step, true);
  add_parts(&parts, last, end, step, false);
  return parts;
}

}  // namespace

std::shared_ptr<FileRequest> Engine::transfer(const NamedFile& file, IoOp::Kind kind, char* address,
                                              size_t nbytes, uint64_t offset) {
  bool is_write = kind == IoOp::Kind::kWrite;
  if (is_write && !file.is_writable()) {
    throw std::invalid_argument("Expected a file that is open for writing, got one for reading: " +
                                file.path());
  }
  if (offset > INT64_MAX || nbytes > INT64_MAX - offset) {
    throw std::invalid_argument("Expected a range below 8 EiB, got " + number(nbytes) +
                                " bytes at offset " + number(offset) + ": " + file.path());
  }
  std::shared_ptr<const OpenFile> buffered = file.buffered(), direct = file.direct();
  size_t unit = file.unit_nbytes();
  size_t step = options_.slab_nbytes;
  std::vector<FilePart> parts = parts_of(offset, nbytes, step, unit, direct && step % unit == 0);
  std::shared_ptr<FileRequest> request =
      std::make_shared<FileRequest>(monitor_, is_write, offset, parts.size());
  {
    std::lock_guard<std::mutex> lock(monitor_->mutex);
    check_open();
    if (!parts.empty()) ++monitor_->num_pending;
    for (const FilePart& part : parts) {
      char* own = address + (part.offset - offset);
      bool is_aligned = reinterpret_cast<uintptr_t>(own) % file.io().memory_alignment == 0;
      scheduler_->enqueue(
          std::make_unique<FileTransfer>(kind, part.is_direct ? direct : buffered, request,
                                         FileTransfer::Range{own, part.nbytes, part.offset},
                                         part.is_direct && !is_aligned ? pool_ : nullptr));
    }
  }
  scheduler_->start();
  return request;
}

bool Engine::wait_event(uint64_t num_events, Seconds timeout) {
  std::unique_lock<std::mutex> lock(monitor_->mutex);
  return monitor_->progress.wait_for(
      lock, timeout, [&] { return monitor_->num_events != num_events || monitor_->is_closing; });
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
    for (auto& [driver, device] : devices_) device->cancel_queued();
    scheduler_->cancel_queued();
    monitor_->progress.wait(lock, [&] { return monitor_->num_pending == 0; });
  }
  copier_->stop();
  for (auto& [driver, device] : devices_) device->stop();
  scheduler_->stop();
  // Destroyed when the lock is released: a driver is never called with it held.
  decltype(devices_) devices;
  std::shared_ptr<PinnedRegion> host;
  std::shared_ptr<SlabPool> pool;
  std::lock_guard<std::mutex> lock(monitor_->mutex);
  final_peak_nbytes_ = pool_->peak_nbytes();
  open_files_.clear();
  files_.clear();
  devices.swap(devices_);
  host.swap(host_);
  pool.swap(pool_);
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
  return monitor_->total.written.busy_seconds();
}

double Engine::read_busy_seconds() const {
  std::lock_guard<std::mutex> lock(monitor_->mutex);
  return monitor_->total.read.busy_seconds();
}

double Engine::silent_seconds(size_t file) const {
  std::lock_guard<std::mutex> lock(monitor_->mutex);
  return file < open_files_.size() ? open_files_[file]->pulse.silent_seconds() : 0.0;
}

std::pair<Copies, Copies> Engine::copies() const {
  std::lock_guard<std::mutex> lock(monitor_->mutex);
  return {monitor_->copied_out, monitor_->copied_in};
}

Traffic Engine::traffic(size_t user) const {
  std::lock_guard<std::mutex> lock(monitor_->mutex);
  return monitor_->traffic.at(user);
}

}  // namespace ssdtrain
