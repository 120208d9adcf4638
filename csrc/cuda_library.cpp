#include "cuda_library.h"

#include <dlfcn.h>

#include <stdexcept>

namespace ssdtrain {

namespace {

template <typename Function>
void find(void* library, const char* name, Function* function) {
  *function = reinterpret_cast<Function>(::dlsym(library, name));
  if (*function == nullptr) {
    throw std::runtime_error(std::string("Expected ") + name +
                             " in libcuda.so.1, got a library without it; update the driver");
  }
}

}  // namespace

const CudaLibrary& CudaLibrary::get() {
  static const CudaLibrary library;
  return library;
}

CudaLibrary::CudaLibrary() {
  void* library =
      ::dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);  // stays open: PyTorch has it too
  if (library == nullptr) {
    throw std::runtime_error(std::string("Expected the CUDA driver, got: ") + ::dlerror());
  }
  find(library, "cuInit", &init);
  find(library, "cuDeviceGet", &device_get);
  find(library, "cuDeviceGetPCIBusId", &device_get_pci_bus_id);
  find(library, "cuDevicePrimaryCtxRetain", &primary_context_retain);
  find(library, "cuDevicePrimaryCtxRelease_v2", &primary_context_release);
  find(library, "cuCtxPushCurrent_v2", &context_push);
  find(library, "cuCtxPopCurrent_v2", &context_pop);
  find(library, "cuStreamCreate", &stream_create);
  find(library, "cuStreamDestroy_v2", &stream_destroy);
  find(library, "cuStreamWaitEvent", &stream_wait_event);
  find(library, "cuEventCreate", &event_create);
  find(library, "cuEventDestroy_v2", &event_destroy);
  find(library, "cuEventRecord", &event_record);
  find(library, "cuEventQuery", &event_query);
  find(library, "cuEventSynchronize", &event_synchronize);
  find(library, "cuMemcpyDtoHAsync_v2", &copy_to_host);
  find(library, "cuMemcpyHtoDAsync_v2", &copy_to_device);
  find(library, "cuMemHostRegister_v2", &host_register);
  find(library, "cuMemHostUnregister", &host_unregister);
  find(library, "cuThreadExchangeStreamCaptureMode", &exchange_capture_mode);
  find(library, "cuGetErrorName", &get_error_name);
  check(init(0), "cuInit");
}

std::string CudaLibrary::error_name(Result result) const {
  const char* name = nullptr;
  if (get_error_name(result, &name) != kSuccess || name == nullptr) return std::to_string(result);
  return name;
}

void CudaLibrary::check(Result result, const char* what) const {
  if (result == kSuccess) return;
  throw std::runtime_error(std::string(what) + ": " + error_name(result));
}

}  // namespace ssdtrain
