#pragma once

#include <string>
#include <system_error>
#include <utility>

namespace ssdtrain {

// A failed system call: errno, what was tried, and the path it was tried on. The bindings turn it
// into OSError(errno, message, path).
class PosixError : public std::system_error {
 public:
  PosixError(int errnum, const std::string& what, std::string path)
      : std::system_error(errnum, std::generic_category(), what), path_(std::move(path)) {}

  int errnum() const { return code().value(); }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

}  // namespace ssdtrain
