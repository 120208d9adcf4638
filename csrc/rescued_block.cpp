#include "rescued_block.h"

#include <cstdlib>
#include <cstring>
#include <utility>

namespace ssdtrain {

RescuedBlock::RescuedBlock(char* data, size_t nbytes, std::shared_ptr<Monitor> monitor)
    : data_(data), nbytes_(nbytes), monitor_(std::move(monitor)) {
  monitor_->rescued_nbytes += nbytes_;
}

RescuedBlock::~RescuedBlock() {
  monitor_->rescued_nbytes -= nbytes_;
  std::free(data_);
}

std::shared_ptr<const char> RescuedBlock::copy_of(const char* source, size_t nbytes,
                                                  std::shared_ptr<Monitor> monitor) {
  char* data = static_cast<char*>(std::malloc(nbytes));
  if (data == nullptr) return nullptr;
  std::memcpy(data, source, nbytes);
  std::shared_ptr<RescuedBlock> block(new RescuedBlock(data, nbytes, std::move(monitor)));
  return std::shared_ptr<const char>(block, data);
}

}  // namespace ssdtrain
