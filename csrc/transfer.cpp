#include "transfer.h"

#include <cerrno>
#include <cstring>
#include <utility>

namespace ssdtrain {

namespace {

constexpr int kMaxRetries = 2;
constexpr int kMaxInterrupted = 1000;  // then something is wrong and EINTR counts as an error

}  // namespace

Transfer::Transfer(IoOp::Kind kind, const OpenFile& file, char* address, size_t nbytes,
                   uint64_t offset)
    : kind_(kind), file_(file), address_(address), nbytes_(nbytes), offset_(offset), stage_(kind) {}

IoOp Transfer::op() {
  size_t done = stage_ == kind_ ? num_done_ : 0;
  return {stage_, file_.fd.get(), address_ + done, nbytes_ - done, offset_ + done, this};
}

Transfer::Outcome Transfer::advance(int64_t result, Monitor* monitor) {
  if (stage_ == IoOp::Kind::kDropCache) return Outcome::kDone;  // a hint, whatever its result
  if (result < 0) return advance_error(static_cast<int>(-result), monitor);
  return stage_ == kind_ ? advance_transfer(result) : next_stage();
}

Transfer::Outcome Transfer::advance_transfer(int64_t nbytes) {
  size_t moved = static_cast<size_t>(nbytes);
  num_moved_ = num_done_ + moved;
  // Direct I/O can only continue at a block: the broken block is moved again.
  if (file_.io.is_direct && num_done_ + moved < nbytes_) moved -= moved % file_.io.block_nbytes;
  if (moved == 0) {
    fail(EIO, is_write() ? "the file takes no more bytes" : "end of file");
    return Outcome::kFailed;
  }
  num_done_ += moved;
  return num_done_ < nbytes_ ? Outcome::kAgain : next_stage();
}

Transfer::Outcome Transfer::next_stage() {
  if (file_.io.is_direct) return Outcome::kDone;
  // Dirty pages cannot be dropped, so a write is brought to the device first.
  stage_ = stage_ == IoOp::Kind::kWrite ? IoOp::Kind::kSync : IoOp::Kind::kDropCache;
  return Outcome::kAgain;
}

Transfer::Outcome Transfer::advance_error(int errnum, Monitor* monitor) {
  if ((errnum == EINTR || errnum == EAGAIN) && num_interrupted_++ < kMaxInterrupted) {
    return Outcome::kAgain;
  }
  if (num_failures_++ < kMaxRetries) {
    ++monitor->num_retries;
    // After a failed write-back the pages may be clean but lost: begin anew.
    if (stage_ == IoOp::Kind::kSync) num_done_ = 0;
    stage_ = kind_;
    return Outcome::kAgain;
  }
  fail(errnum, std::strerror(errnum));
  return Outcome::kFailed;
}

void Transfer::fail(int errnum, std::string message) {
  errnum_ = errnum;
  message_ = std::move(message);
}

}  // namespace ssdtrain
