#pragma once

#include <memory>

#include "file_request.h"
#include "slab_pool.h"
#include "transfer.h"

namespace ssdtrain {

// One part of a request, between a named file and memory: straight, or through a slab where the
// memory is not aligned as direct I/O wants it. There is a slab for each transfer under way.
class FileTransfer : public Transfer {
 public:
  struct Range {
    char* address;
    size_t nbytes;
    uint64_t offset;
  };

  // `pool`: null for memory that can be used as it is.
  FileTransfer(IoOp::Kind kind, std::shared_ptr<const OpenFile> file,
               std::shared_ptr<FileRequest> request, Range range, std::shared_ptr<SlabPool> pool);

  bool begin() override;
  void prepare() override;
  void settle() override;
  void finish() override;
  void cancel() override;

 private:
  const std::shared_ptr<const OpenFile> file_;
  const std::shared_ptr<FileRequest> request_;
  const std::shared_ptr<SlabPool> pool_;
  char* const own_;
  std::shared_ptr<char> slab_;
};

}  // namespace ssdtrain
