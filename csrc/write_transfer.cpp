#include "write_transfer.h"

#include <utility>

#include "rescued_block.h"

namespace ssdtrain {

WriteTransfer::WriteTransfer(std::shared_ptr<Monitor> monitor, const OpenFile& file,
                             std::shared_ptr<WriteState> write, size_t chunk, char* slab)
    : Transfer(IoOp::Kind::kWrite, file, slab, write->chunk(chunk).nbytes,
               write->file_offset(chunk)),
      monitor_(std::move(monitor)),
      write_(std::move(write)),
      chunk_(chunk) {}

bool WriteTransfer::begin() {
  if (!write_->begin_write(chunk_)) return false;
  slab_ = write_->chunk(chunk_).bytes;
  return true;
}

void WriteTransfer::settle() {
  if (errnum() != 0) rescued_ = RescuedBlock::copy_of(slab_.get(), nbytes(), monitor_);
}

void WriteTransfer::finish() {
  slab_.reset();  // before the request is seen to be done
  if (errnum() == 0) {
    write_->end_write(chunk_);
  } else {
    write_->fail_write(chunk_, errnum(), std::move(rescued_));
  }
}

void WriteTransfer::cancel() { write_->cancel_all(); }

}  // namespace ssdtrain
