#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "copier.h"
#include "device_copier.h"
#include "device_driver.h"
#include "doorbell.h"
#include "file_request.h"
#include "io_backend.h"
#include "monitor.h"
#include "named_file.h"
#include "pinned_region.h"
#include "read_state.h"
#include "scheduler.h"
#include "slab_pool.h"
#include "spill_file.h"
#include "uring_backend.h"
#include "write_state.h"

namespace ssdtrain {

struct EngineOptions {
  std::string kind = "threads";  // "io_uring" or "threads"
  size_t staging_nbytes = 0;     // limit; and how much of it is used until grow_staging(): 0 is all
  size_t first_staging_nbytes = 0;
  size_t slab_nbytes = 0;
  bool has_checksum = false;
  size_t num_threads = 4;
  size_t queue_depth = 64;
  size_t host_nbytes = 0;  // limit of the host tier
};

// Where a piece comes back to. `ready`: device memory, which may be written after this point.
struct Destination {
  char* address;
  size_t capacity;
  std::shared_ptr<Fence> ready = nullptr;
};

// Moves bytes between memory and spill files, in the background. Thread-safe.
//
// A write goes source -> slab (copy threads) -> file (backend); a read goes file -> destination, or
// slab -> destination while the bytes are still in memory. Between a device and a file a slab is
// passed in both directions (see device_copier.h). The file index after the last one is the host
// tier: its writes end in host memory, which grows by grow_host().
class Engine {
 public:
  using Files = std::vector<std::shared_ptr<SpillFile>>;
  using Seconds = std::chrono::duration<double>;
  // Lets a caller wrap the backend; gets the staging memory worth registering.
  using OpenBackend = std::function<std::unique_ptr<IoBackend>(
      const EngineOptions& options, StagingSpan staging, const ProbeFile& probe,
      IoBackend::OnComplete on_complete)>;

  static std::unique_ptr<IoBackend> open_backend(const EngineOptions& options, StagingSpan staging,
                                                 const ProbeFile& probe,
                                                 IoBackend::OnComplete on_complete);

  Engine(Files files, EngineOptions options, const OpenBackend& open = open_backend);
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;
  ~Engine();

  // Gets a device ready for writes and reads with its fences. Empty, or why its copies block.
  std::string add_device(std::shared_ptr<DeviceDriver> driver);
  // Uses at least `nbytes` for slabs, as far as there are. Empty, or why they are not pinned.
  std::string grow_staging(size_t nbytes);
  // Makes the host tier at least `nbytes` long. Empty, or why it is not pinned.
  std::string grow_host(size_t nbytes);

  // `producer`: sources are in device memory, to be read after this point of a stream.
  std::shared_ptr<WriteState> write(Extent extent, std::vector<PieceSource> sources,
                                    std::shared_ptr<Fence> producer = nullptr);
  std::shared_ptr<ReadState> read(const std::shared_ptr<WriteState>& write, size_t piece,
                                  const Destination& destination);
  // Reads or writes a range of a named file, any address, any length, whoever wrote what is there;
  // the memory must stay until it is done. Parts of slab_nbytes; in no order beside others.
  std::shared_ptr<FileRequest> transfer(const NamedFile& file, IoOp::Kind kind, char* address,
                                        size_t nbytes, uint64_t offset);
  // False when the time is over first.
  bool wait_inflight(uint64_t max_nbytes, Seconds timeout);
  bool wait_idle(Seconds timeout);
  // Until something was done after the event of that number.
  bool wait_event(uint64_t num_events, Seconds timeout);
  // Idempotent. Gives up what has not begun, waits for what has, joins the threads.
  void close();
  bool is_closed() const;
  // Throws when it is closed.
  void expect_open() const;

  const char* kind() const { return kind_; }
  bool has_registered_buffers() const { return has_registered_buffers_; }
  const std::vector<std::string>& notes() const { return notes_; }
  size_t staging_nbytes() const { return staging_nbytes_; }
  // Limit of the host tier; 0 without one.
  size_t host_nbytes() const { return options_.host_nbytes; }
  size_t slab_nbytes() const { return options_.slab_nbytes; }
  size_t staging_in_use_nbytes() const;
  size_t peak_staging_nbytes() const;
  double write_busy_seconds() const;
  double read_busy_seconds() const;
  // How long the drive has owed an answer for this file and has given none; 0 when it owes none.
  double silent_seconds(size_t file) const;
  // Of one user's files.
  Traffic traffic(size_t user) const;
  // Out of accelerators and into them.
  std::pair<Copies, Copies> copies() const;
  const Monitor& counters() const { return *monitor_; }

 private:
  void check_open() const;  // monitor_->mutex held
  void check_extent(const Extent& extent) const;
  void check_destination(const WriteState& write, size_t piece,
                         const Destination& destination) const;
  // Whether the part is forwarded from memory.
  bool add_read(const std::shared_ptr<WriteState>& write, const Part& part,
                const std::shared_ptr<ReadState>& read, char* address);
  void add_device_read(const std::shared_ptr<WriteState>& write, const Part& part,
                       const std::shared_ptr<ReadState>& read, char* address);
  DeviceCopier* device_copier(const Fence* fence) const;  // null for a null fence
  bool is_host(size_t file) const { return host_ && file == files_.size(); }
  size_t block_nbytes(size_t file) const;

  const EngineOptions options_;
  Files files_;
  std::vector<std::shared_ptr<const OpenFile>> open_files_;
  const std::shared_ptr<Monitor> monitor_;
  const std::shared_ptr<Doorbell> doorbell_;
  std::shared_ptr<SlabPool> pool_;
  std::unique_ptr<Scheduler> scheduler_;
  std::unique_ptr<Copier> copier_;
  std::shared_ptr<PinnedRegion> host_;  // null without a host tier
  std::map<DeviceDriver*, std::unique_ptr<DeviceCopier>> devices_;
  const char* kind_ = "";
  bool has_registered_buffers_ = false;
  std::vector<std::string> notes_;
  size_t staging_nbytes_ = 0;
  size_t final_peak_nbytes_ = 0;  // once the pool is gone
  std::mutex close_mutex_;
  bool is_stopped_ = false;  // guarded by close_mutex_
};

}  // namespace ssdtrain
