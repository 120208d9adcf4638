#include "pinned_region.h"

#include <algorithm>

namespace ssdtrain {

PinnedRegion::~PinnedRegion() {
  for (const Pinned& pinned : pinned_) pinned.driver->unpin(pinned.address);
}

size_t PinnedRegion::nbytes() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return segments_.empty() ? 0 : segments_.back().start + segments_.back().nbytes;
}

size_t PinnedRegion::copyable_nbytes(const char* address, size_t nbytes) const {
  std::lock_guard<std::mutex> lock(mutex_);
  for (const Segment& segment : segments_) {
    const char* start = data() + segment.start;
    if (address < start || address >= start + segment.nbytes) continue;
    return std::min<size_t>(nbytes, start + segment.nbytes - address);
  }
  return nbytes;
}

std::string PinnedRegion::grow(size_t nbytes) {
  std::lock_guard<std::mutex> lock(mutex_);
  size_t start = segments_.empty() ? 0 : segments_.back().start + segments_.back().nbytes;
  if (nbytes <= start) return "";
  segments_.push_back({start, nbytes - start});
  std::string reason;
  for (const std::shared_ptr<DeviceDriver>& driver : drivers_) {
    std::string why = pin(driver, segments_.back());
    if (reason.empty()) reason = std::move(why);
  }
  return reason;
}

std::string PinnedRegion::add_driver(const std::shared_ptr<DeviceDriver>& driver) {
  std::lock_guard<std::mutex> lock(mutex_);
  drivers_.push_back(driver);
  std::string reason;
  for (const Segment& segment : segments_) {
    std::string why = pin(driver, segment);
    if (reason.empty()) reason = std::move(why);
  }
  return reason;
}

std::string PinnedRegion::pin(const std::shared_ptr<DeviceDriver>& driver, const Segment& segment) {
  char* address = data() + segment.start;
  std::string reason = driver->pin(address, segment.nbytes);
  if (reason.empty()) pinned_.push_back({driver, address});
  return reason;
}

}  // namespace ssdtrain
