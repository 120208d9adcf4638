#include "cuda_driver.h"

#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cctype>
#include <fstream>

namespace ssdtrain {

namespace {

constexpr unsigned kStreamNonBlocking = 1;  // no order with the legacy stream but by our events
constexpr unsigned kEventBlockingSync = 1;  // a waiting thread sleeps
constexpr unsigned kEventDisableTiming = 2;
constexpr unsigned kHostRegisterPortable = 1;  // pinned for every device
constexpr int kCaptureRelaxed = 2;

CudaLibrary::Stream as_stream(uint64_t handle) {
  return reinterpret_cast<CudaLibrary::Stream>(handle);
}
CudaLibrary::Event as_event(uint64_t handle) {
  return reinterpret_cast<CudaLibrary::Event>(handle);
}

// Best effort: without it copies may cross to another socket.
void move_to_node(char* address, size_t nbytes, int node) {
  constexpr int kPreferred = 1;  // MPOL_PREFERRED
  constexpr unsigned kMove = 2;  // MPOL_MF_MOVE
  if (node < 0 || node >= 64) return;
  unsigned long mask = 1UL << node;
  ::syscall(SYS_mbind, address, nbytes, kPreferred, &mask, 65UL, kMove);
}

}  // namespace

// Makes the context current for a scope. What is called inside belongs to no graph: while any
// thread captures one, queries and copies of another thread would otherwise be refused, and spoil
// the capture.
class CudaDriver::Current {
 public:
  explicit Current(const CudaDriver& driver) : cuda_(driver.cuda_) {
    cuda_.check(cuda_.context_push(driver.context_), "cuCtxPushCurrent");
    cuda_.exchange_capture_mode(&capture_mode_);
  }
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;
  ~Current() {
    cuda_.exchange_capture_mode(&capture_mode_);
    CudaLibrary::Context popped;
    cuda_.context_pop(&popped);
  }

 private:
  const CudaLibrary& cuda_;
  int capture_mode_ = kCaptureRelaxed;
};

CudaDriver::CudaDriver(int index) : cuda_(CudaLibrary::get()), index_(index) {
  cuda_.check(cuda_.device_get(&device_, index), "cuDeviceGet");
  cuda_.check(cuda_.primary_context_retain(&context_, device_), "cuDevicePrimaryCtxRetain");
  Current current(*this);
  out_stream_ = create_stream();
  in_stream_ = create_stream();
}

// At the end of the process the driver may be gone already: results do not matter.
CudaDriver::~CudaDriver() {
  cuda_.context_push(context_);
  for (Event event : free_events_) cuda_.event_destroy(as_event(event));
  cuda_.stream_destroy(as_stream(out_stream_));
  cuda_.stream_destroy(as_stream(in_stream_));
  CudaLibrary::Context popped;
  cuda_.context_pop(&popped);
  cuda_.primary_context_release(device_);
}

DeviceDriver::Stream CudaDriver::create_stream() {
  CudaLibrary::Stream stream;
  cuda_.check(cuda_.stream_create(&stream, kStreamNonBlocking), "cuStreamCreate");
  return reinterpret_cast<Stream>(stream);
}

DeviceDriver::Event CudaDriver::create_event() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!free_events_.empty()) {
      Event event = free_events_.back();
      free_events_.pop_back();
      return event;
    }
  }
  CudaLibrary::Event event;
  cuda_.check(cuda_.event_create(&event, kEventBlockingSync | kEventDisableTiming),
              "cuEventCreate");
  return reinterpret_cast<Event>(event);
}

DeviceDriver::Event CudaDriver::record(Stream stream) {
  Current current(*this);
  Event event = create_event();
  CudaLibrary::Result result = cuda_.event_record(as_event(event), as_stream(stream));
  if (result != CudaLibrary::kSuccess) release(event);
  cuda_.check(result, "cuEventRecord");
  return event;
}

void CudaDriver::wait(Stream stream, Event event) {
  Current current(*this);
  cuda_.check(cuda_.stream_wait_event(as_stream(stream), as_event(event), 0), "cuStreamWaitEvent");
}

void CudaDriver::copy_out(Stream stream, char* host, uint64_t device, size_t nbytes) {
  Current current(*this);
  cuda_.check(cuda_.copy_to_host(host, device, nbytes, as_stream(stream)), "cuMemcpyDtoHAsync");
}

void CudaDriver::copy_in(Stream stream, uint64_t device, const char* host, size_t nbytes) {
  Current current(*this);
  cuda_.check(cuda_.copy_to_device(device, host, nbytes, as_stream(stream)), "cuMemcpyHtoDAsync");
}

void CudaDriver::synchronize(Event event) {
  Current current(*this);
  cuda_.check(cuda_.event_synchronize(as_event(event)), "cuEventSynchronize");
}

bool CudaDriver::is_complete(Event event) {
  Current current(*this);
  CudaLibrary::Result result = cuda_.event_query(as_event(event));
  if (result == CudaLibrary::kNotReady) return false;
  cuda_.check(result, "cuEventQuery");
  return true;
}

void CudaDriver::release(Event event) noexcept {
  std::lock_guard<std::mutex> lock(mutex_);
  free_events_.push_back(event);
}

int CudaDriver::numa_node() const {
  char id[32] = {};
  if (cuda_.device_get_pci_bus_id(id, sizeof(id), device_) != CudaLibrary::kSuccess) return -1;
  std::string name(id);
  std::transform(name.begin(), name.end(), name.begin(),
                 [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
  int node = -1;
  std::ifstream("/sys/bus/pci/devices/" + name + "/numa_node") >> node;
  return node;
}

std::string CudaDriver::pin(char* address, size_t nbytes) {
  Current current(*this);
  move_to_node(address, nbytes, numa_node());
  CudaLibrary::Result result = cuda_.host_register(address, nbytes, kHostRegisterPortable);
  if (result == CudaLibrary::kSuccess) {
    std::lock_guard<std::mutex> lock(mutex_);
    pinned_.insert(address);
    return "";
  }
  // Portable: what another device pinned is pinned for this one, and is for that one to unpin.
  if (result == CudaLibrary::kHostMemoryAlreadyRegistered) return "";
  return "host memory is not pinned, copies block: cuMemHostRegister: " + cuda_.error_name(result);
}

void CudaDriver::unpin(char* address) noexcept {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (pinned_.erase(address) == 0) return;
  }
  cuda_.context_push(context_);
  cuda_.host_unregister(address);
  CudaLibrary::Context popped;
  cuda_.context_pop(&popped);
}

}  // namespace ssdtrain
