#pragma once

#include <cstddef>

namespace ssdtrain {

// Anonymous memory, aligned to huge pages and backed by them where the kernel agrees. A forked
// child does not inherit it, so a fork never copies pages that a device is reading.
class MappedRegion {
 public:
  // kAddresses: there may be less memory than that now, and it is taken only where it is used.
  enum class Kind { kMemory, kAddresses };

  explicit MappedRegion(size_t nbytes, Kind kind = Kind::kMemory);
  MappedRegion(const MappedRegion&) = delete;
  MappedRegion& operator=(const MappedRegion&) = delete;
  ~MappedRegion();

  char* data() const { return data_; }
  size_t nbytes() const { return nbytes_; }

 private:
  char* data_ = nullptr;
  size_t nbytes_;
};

}  // namespace ssdtrain
