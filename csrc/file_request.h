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

// Why a request failed, and how many bytes from its beginning were moved all the same.
struct FileError {
  int errnum;
  uint64_t moved_nbytes;
  std::string message;
};

// The life of one request to read or write a range of a named file.
class FileRequest {
 public:
  FileRequest(std::shared_ptr<Monitor> monitor, bool is_write, uint64_t offset, size_t num_parts);
  FileRequest(const FileRequest&) = delete;
  FileRequest& operator=(const FileRequest&) = delete;

  // For the owner of the request: any thread, no lock held.
  bool is_done() const { return num_unfinished_.load() == 0; }
  bool wait_done(std::chrono::duration<double> timeout);
  // What has not begun does not begin any more; the request is done when the rest is.
  void cancel() { is_cancelled_ = true; }
  std::optional<FileError> error() const;

  // For the engine: monitor->mutex held.
  bool is_cancelled() const { return is_cancelled_.load(); }
  void finish();  // one part
  // One part: the file took, or gave, what lies before `offset`. The first in the file is told.
  void finish_failed(uint64_t offset, int errnum, std::string message);

 private:
  const std::shared_ptr<Monitor> monitor_;
  const bool is_write_;
  const uint64_t offset_;
  std::optional<FileError> error_;
  std::condition_variable changed_;
  std::atomic<bool> is_cancelled_{false};
  std::atomic<size_t> num_unfinished_;  // parts
};

}  // namespace ssdtrain
