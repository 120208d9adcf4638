#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "io_backend.h"
#include "monitor.h"
#include "spill_file.h"

namespace ssdtrain {

// One block-aligned range on its way to or from a file: the operations it takes (short transfers
// continued, temporary errors tried again, the page cache let go where the file is buffered) until
// it is whole or has failed for good.
class Transfer {
 public:
  enum class Outcome { kAgain, kDone, kFailed };

  Transfer(IoOp::Kind kind, const OpenFile& file, char* address, size_t nbytes, uint64_t offset);
  virtual ~Transfer() = default;
  Transfer(const Transfer&) = delete;
  Transfer& operator=(const Transfer&) = delete;

  bool is_write() const { return kind_ == IoOp::Kind::kWrite; }
  size_t nbytes() const { return nbytes_; }
  uint64_t offset() const { return offset_; }
  char* address() const { return address_; }

  // The operation to submit now.
  IoOp op();
  // Takes the result of that operation.
  Outcome advance(int64_t result, Monitor* monitor);
  int errnum() const { return errnum_; }
  const std::string& message() const { return message_; }
  // How many bytes the drive has moved so far, whether the rest follows or not.
  size_t num_moved() const { return num_moved_; }
  // Whose file it is.
  size_t user() const { return file_.user; }
  // Of the drive it is on.
  Pulse& pulse() const { return file_.pulse; }
  // monitor->mutex held: whether somebody waits for it.
  virtual bool is_awaited() const { return false; }

  // monitor->mutex held: false when nobody wants it any more.
  virtual bool begin() = 0;
  // Before the first operation, no lock held: whatever takes long.
  virtual void prepare() {}
  // After the last operation, no lock held: whatever takes long.
  virtual void settle() = 0;
  // monitor->mutex held: tell the request. After settle().
  virtual void finish() = 0;
  // monitor->mutex held: instead of begin(), when the engine closes.
  virtual void cancel() = 0;

 protected:
  void fail(int errnum, std::string message);
  // Before the first operation.
  void set_address(char* address) { address_ = address; }

 private:
  Outcome advance_transfer(int64_t nbytes);
  Outcome advance_error(int errnum, Monitor* monitor);
  Outcome next_stage();

  const IoOp::Kind kind_;
  const OpenFile& file_;
  char* address_;
  const size_t nbytes_;
  const uint64_t offset_;
  IoOp::Kind stage_;
  size_t num_done_ = 0;   // bytes, whole blocks where the file is direct
  size_t num_moved_ = 0;  // bytes
  int num_interrupted_ = 0;
  int num_failures_ = 0;
  int errnum_ = 0;
  std::string message_;
};

}  // namespace ssdtrain
