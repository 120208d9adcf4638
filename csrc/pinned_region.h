#pragma once

#include <cstddef>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "device_driver.h"
#include "mapped_region.h"

namespace ssdtrain {

// Host memory that drivers know. Grows up to a limit fixed at construction, never moves, and is
// unpinned before it is unmapped. Thread-safe.
class PinnedRegion {
 public:
  explicit PinnedRegion(size_t limit_nbytes, MappedRegion::Kind kind = MappedRegion::Kind::kMemory)
      : region_(limit_nbytes, kind) {}
  PinnedRegion(const PinnedRegion&) = delete;
  PinnedRegion& operator=(const PinnedRegion&) = delete;
  ~PinnedRegion();

  char* data() const { return region_.data(); }
  size_t limit_nbytes() const { return region_.nbytes(); }
  size_t nbytes() const;
  // How many of the `nbytes` at `address`, here or elsewhere, one copy of a device may touch:
  // drivers refuse a copy that goes beyond what was made known to them in one step.
  size_t copyable_nbytes(const char* address, size_t nbytes) const;
  // Makes the first `nbytes` usable, and known to every driver. Empty, or why it is not pinned.
  std::string grow(size_t nbytes);
  // Makes what is usable now, and later, known to `driver`.
  std::string add_driver(const std::shared_ptr<DeviceDriver>& driver);

 private:
  struct Segment {
    size_t start;
    size_t nbytes;
  };
  struct Pinned {
    std::shared_ptr<DeviceDriver> driver;
    char* address;
  };
  std::string pin(const std::shared_ptr<DeviceDriver>& driver, const Segment& segment);

  MappedRegion region_;
  mutable std::mutex mutex_;
  std::vector<Segment> segments_;
  std::vector<std::shared_ptr<DeviceDriver>> drivers_;
  std::vector<Pinned> pinned_;
};

}  // namespace ssdtrain
