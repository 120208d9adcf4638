#pragma once

#include <memory>

#include "read_state.h"
#include "transfer.h"
#include "write_state.h"

namespace ssdtrain {

// One part of a piece, from the file straight to its destination.
class ReadTransfer : public Transfer {
 public:
  struct Source {
    std::shared_ptr<WriteState> write;
    const Part* part;
    bool has_checksum;
  };

  // `nbytes` covers the part and the rest of its last block.
  ReadTransfer(std::shared_ptr<Monitor> monitor, const OpenFile& file,
               std::shared_ptr<ReadState> read, Source source, char* address, size_t nbytes);

  bool is_awaited() const override { return read_->is_awaited(); }
  bool begin() override;
  void settle() override;
  void finish() override;
  void cancel() override;

 private:
  const std::shared_ptr<Monitor> monitor_;
  const std::shared_ptr<ReadState> read_;
  const Source source_;
};

}  // namespace ssdtrain
