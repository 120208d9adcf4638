#pragma once

#include <unistd.h>

#include <memory>
#include <stdexcept>
#include <string>
#include <utility>

namespace ssdtrain {

// Shared ownership that knows the process it was made in. [Note: fork]
//
// A forked child inherits copies of our objects but none of our threads, and perhaps a mutex that
// was locked at the moment of the fork. In the child every use raises, and destruction leaks on
// purpose: joining, closing or unlocking there would hang the child or disturb the parent.
template <typename T>
class ForkGuard {
 public:
  ForkGuard(std::shared_ptr<T> value, const char* name)
      : value_(std::move(value)), name_(name), pid_(::getpid()) {}
  ForkGuard(ForkGuard&&) noexcept = default;
  ForkGuard& operator=(ForkGuard&&) = delete;
  ~ForkGuard() {
    if (is_forked()) new std::shared_ptr<T>(std::move(value_));
  }

  bool is_forked() const { return ::getpid() != pid_; }

  const std::shared_ptr<T>& get() const {
    if (is_forked()) {
      throw std::runtime_error(std::string("Expected ") + name_ +
                               " to be used in the process that opened it, got a forked child; "
                               "open another one in the child");
    }
    return value_;
  }
  T* operator->() const { return get().get(); }

 private:
  std::shared_ptr<T> value_;
  const char* name_;
  pid_t pid_;
};

}  // namespace ssdtrain
