#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "monitor.h"

namespace ssdtrain {

struct ReadError {
  int errnum;
  uint64_t offset;
  uint64_t nbytes;
  std::string message;
};

// The life of one read request: a number of parts, from the file or from memory.
class ReadState {
 public:
  ReadState(std::shared_ptr<Monitor> monitor, size_t num_parts);
  ReadState(const ReadState&) = delete;
  ReadState& operator=(const ReadState&) = delete;

  // For the owner of the request: any thread, no lock held.
  bool is_done() const { return num_unfinished_.load() == 0; }
  bool wait_done(std::chrono::duration<double> timeout);
  std::optional<ReadError> error() const;
  uint64_t read_nbytes() const { return read_nbytes_.load(); }
  uint64_t forwarded_nbytes() const { return forwarded_nbytes_.load(); }

  // For the engine: monitor->mutex held.
  void finish_forwarded(size_t nbytes);
  void finish_read(size_t nbytes);
  void finish_failed(ReadError error);

 private:
  void finish();

  const std::shared_ptr<Monitor> monitor_;
  std::optional<ReadError> error_;  // the first
  std::condition_variable changed_;
  std::atomic<size_t> num_unfinished_;
  std::atomic<uint64_t> read_nbytes_{0};
  std::atomic<uint64_t> forwarded_nbytes_{0};
};

}  // namespace ssdtrain
