#include "file_transfer.h"

#include <cerrno>
#include <cstring>
#include <utility>

namespace ssdtrain {

FileTransfer::FileTransfer(IoOp::Kind kind, std::shared_ptr<const OpenFile> file,
                           std::shared_ptr<FileRequest> request, Range range,
                           std::shared_ptr<SlabPool> pool)
    : Transfer(kind, *file, range.address, range.nbytes, range.offset),
      file_(std::move(file)),
      request_(std::move(request)),
      pool_(std::move(pool)),
      own_(range.address) {}

bool FileTransfer::begin() {
  if (request_->is_cancelled()) {
    request_->finish_failed(offset(), ECANCELED, "it was cancelled");
    return false;
  }
  if (!pool_) return true;
  SlabLease lease = pool_->try_lease(SlabPool::For::kRead);
  if (!lease) {  // all slabs are with writes of spill files
    request_->finish_failed(offset(), ENOBUFS, "there is no slab for memory that is not aligned");
    return false;
  }
  slab_ = std::move(lease).share();
  set_address(slab_.get());
  return true;
}

void FileTransfer::prepare() {
  if (slab_ && is_write()) std::memcpy(slab_.get(), own_, nbytes());
}

void FileTransfer::settle() {
  if (slab_ && !is_write() && errnum() == 0) std::memcpy(own_, slab_.get(), nbytes());
}

void FileTransfer::finish() {
  slab_.reset();  // before the request is seen to be done
  if (errnum() == 0) {
    request_->finish();
  } else {
    request_->finish_failed(offset() + num_moved(), errnum(), message());
  }
}

void FileTransfer::cancel() {
  request_->finish_failed(offset(), ECANCELED, "the engine was closed");
}

}  // namespace ssdtrain
