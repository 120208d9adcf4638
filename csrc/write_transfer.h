#pragma once

#include <memory>

#include "transfer.h"
#include "write_state.h"

namespace ssdtrain {

// One chunk of a write request, from its slab to the file.
class WriteTransfer : public Transfer {
 public:
  // `slab` is the chunk's. Until begin() the chunk alone keeps it leased, so that a cancelled chunk
  // returns it at once.
  WriteTransfer(std::shared_ptr<Monitor> monitor, const OpenFile& file,
                std::shared_ptr<WriteState> write, size_t chunk, char* slab);

  bool begin() override;
  void settle() override;
  void finish() override;
  void cancel() override;

 private:
  const std::shared_ptr<Monitor> monitor_;
  const std::shared_ptr<WriteState> write_;
  const size_t chunk_;
  std::shared_ptr<const char> slab_;
  std::shared_ptr<const char> rescued_;
};

}  // namespace ssdtrain
