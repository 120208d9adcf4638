#pragma once

#include <cstddef>

namespace ssdtrain {

// Anonymous memory, aligned to huge pages and backed by them where the kernel agrees. A forked
// child does not inherit it, so a fork never copies pages that a device is reading.
class MappedRegion {
 public:
  explicit MappedRegion(size_t nbytes);
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
