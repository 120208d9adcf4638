#include "read_transfer.h"

#include <cerrno>
#include <utility>

#include "crc32c.h"

namespace ssdtrain {

ReadTransfer::ReadTransfer(std::shared_ptr<Monitor> monitor, const OpenFile& file,
                           std::shared_ptr<ReadState> read, Source source, char* address,
                           size_t nbytes)
    : Transfer(IoOp::Kind::kRead, file, address, nbytes,
               source.write->file_offset(source.part->chunk) + source.part->chunk_offset),
      monitor_(std::move(monitor)),
      read_(std::move(read)),
      source_(std::move(source)) {}

bool ReadTransfer::begin() {
  read_->note_begun();
  return true;
}

void ReadTransfer::settle() {
  if (errnum() != 0 || !source_.has_checksum) return;
  if (crc32c(0, address(), source_.part->nbytes) != source_.part->checksum) {
    fail(EBADMSG, "checksum mismatch: the bytes in the file are not those that were written");
  }
}

void ReadTransfer::finish() {
  if (errnum() == 0) {
    read_->count_read(nbytes());
    read_->finish();
    return;
  }
  ++monitor_->num_read_errors;
  read_->finish_failed({errnum(), offset(), nbytes(), message()});
}

void ReadTransfer::cancel() {
  read_->finish_failed({ECANCELED, offset(), nbytes(), "the engine was closed"});
}

}  // namespace ssdtrain
