#pragma once

#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "cuda_library.h"
#include "device_driver.h"

namespace ssdtrain {

// One CUDA device, through the driver API, in the primary context that PyTorch uses too. Streams
// are CUstream handles, as PyTorch hands them out.
class CudaDriver : public DeviceDriver {
 public:
  // Throws when there is no driver or no such device.
  explicit CudaDriver(int index);
  CudaDriver(const CudaDriver&) = delete;
  CudaDriver& operator=(const CudaDriver&) = delete;
  ~CudaDriver() override;

  int index() const override { return index_; }
  Event record(Stream stream) override;
  void wait(Stream stream, Event event) override;
  void copy_out(Stream stream, char* host, uint64_t device, size_t nbytes) override;
  void copy_in(Stream stream, uint64_t device, const char* host, size_t nbytes) override;
  void synchronize(Event event) override;
  bool is_complete(Event event) override;
  void release(Event event) noexcept override;
  Stream out_stream() override { return out_stream_; }
  Stream in_stream() override { return in_stream_; }
  // Moves the pages to the memory next to the device first.
  std::string pin(char* address, size_t nbytes) override;
  void unpin(char* address) noexcept override;

 private:
  class Current;

  Stream create_stream();
  Event create_event();
  int numa_node() const;  // -1 when unknown

  const CudaLibrary& cuda_;
  const int index_;
  CudaLibrary::Device device_ = 0;
  CudaLibrary::Context context_ = nullptr;
  Stream out_stream_ = 0;
  Stream in_stream_ = 0;
  std::mutex mutex_;  // of what follows; a leaf
  std::vector<Event> free_events_;
  std::set<char*> pinned_;  // by this driver
};

}  // namespace ssdtrain
