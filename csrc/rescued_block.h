#pragma once

#include <cstddef>
#include <memory>

#include "monitor.h"

namespace ssdtrain {

// Heap copy of bytes whose file write failed; counted while it lives.
class RescuedBlock {
 public:
  RescuedBlock(const RescuedBlock&) = delete;
  RescuedBlock& operator=(const RescuedBlock&) = delete;
  ~RescuedBlock();

  // Null when there is no memory for it.
  static std::shared_ptr<const char> copy_of(const char* source, size_t nbytes,
                                             std::shared_ptr<Monitor> monitor);

 private:
  RescuedBlock(char* data, size_t nbytes, std::shared_ptr<Monitor> monitor);

  char* data_;
  size_t nbytes_;
  std::shared_ptr<Monitor> monitor_;
};

}  // namespace ssdtrain
