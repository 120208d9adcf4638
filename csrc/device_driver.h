#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>

namespace ssdtrain {

// One accelerator as the engine sees it: streams, events, copies. Streams, events and device
// addresses are opaque numbers. Thread-safe; every call may throw std::runtime_error.
//
// Never called with a lock of the engine held (but for release(), whose own lock is a leaf).
class DeviceDriver {
 public:
  using Stream = uint64_t;
  using Event = uint64_t;

  virtual ~DeviceDriver() = default;

  virtual int index() const = 0;
  // An event that completes when everything queued on `stream` so far is over.
  virtual Event record(Stream stream) = 0;
  // What is queued on `stream` from now on runs after `event`.
  virtual void wait(Stream stream, Event event) = 0;
  virtual void copy_out(Stream stream, char* host, uint64_t device, size_t nbytes) = 0;
  virtual void copy_in(Stream stream, uint64_t device, const char* host, size_t nbytes) = 0;
  // Blocks the calling thread.
  virtual void synchronize(Event event) = 0;
  virtual bool is_complete(Event event) = 0;
  // The handle may be another event's from now on; waits already queued stay valid.
  virtual void release(Event event) noexcept = 0;
  // The driver's own streams for copies from and to the device.
  virtual Stream out_stream() = 0;
  virtual Stream in_stream() = 0;
  // Makes host memory fit for copies that do not block. Empty, or why it is not.
  virtual std::string pin(char* address, size_t nbytes) = 0;
  virtual void unpin(char* address) noexcept = 0;
};

// A point in the work of a stream, on loan from its driver.
class Fence {
 public:
  Fence(std::shared_ptr<DeviceDriver> driver, DeviceDriver::Stream stream)
      : driver_(std::move(driver)), event_(driver_->record(stream)) {}
  Fence(const Fence&) = delete;
  Fence& operator=(const Fence&) = delete;
  ~Fence() { driver_->release(event_); }

  DeviceDriver* driver() const { return driver_.get(); }
  void synchronize() const { driver_->synchronize(event_); }
  bool is_complete() const { return driver_->is_complete(event_); }
  // Work queued on `stream` later comes after this point.
  void make_wait(DeviceDriver::Stream stream) const { driver_->wait(stream, event_); }

 private:
  const std::shared_ptr<DeviceDriver> driver_;
  const DeviceDriver::Event event_;
};

}  // namespace ssdtrain
