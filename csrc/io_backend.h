#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace ssdtrain {

// One file operation, tried once.
struct IoOp {
  enum class Kind {
    kRead,
    kWrite,
    kSync,       // start and wait for write-back of the range (buffered files)
    kDropCache,  // let go of the page cache of the range (buffered files)
  };
  Kind kind;
  int fd;
  char* address;
  size_t nbytes;
  uint64_t offset;
  void* context;  // handed back on completion
};

// Executes file operations. Knows nothing of retries, short transfers, order or priority: each
// submitted operation is tried once and its raw result (bytes moved, or -errno) reported once.
//
// A wrapper that delays, shortens or fails operations needs only this interface.
class IoBackend {
 public:
  // Runs on a thread of the backend; may call submit(). Nothing of the operation is touched after.
  using OnComplete = std::function<void(void* context, int64_t result)>;

  virtual ~IoBackend() = default;

  virtual const char* kind() const = 0;
  // The most operations it may hold at once; the caller keeps to it.
  virtual size_t depth() const = 0;
  virtual bool has_registered_buffers() const { return false; }
  virtual std::vector<std::string> notes() const { return {}; }

  // Never blocks. Any thread.
  virtual void submit(const IoOp& op) = 0;
  // Joins the threads. Called once, with nothing in flight.
  virtual void stop() = 0;
};

using BackendFactory = std::function<std::unique_ptr<IoBackend>(IoBackend::OnComplete)>;

}  // namespace ssdtrain
