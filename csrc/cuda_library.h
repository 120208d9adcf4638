#pragma once

#include <cstddef>
#include <string>

namespace ssdtrain {

// The functions we use of libcuda.so.1, found at run time: nothing of CUDA is needed to build or to
// import the package. Types are those of the driver API, spelled out.
class CudaLibrary {
 public:
  using Result = int;
  using Device = int;
  using Context = void*;
  using Stream = void*;
  using Event = void*;
  using Pointer = unsigned long long;

  static constexpr Result kSuccess = 0;
  static constexpr Result kNotReady = 600;
  static constexpr Result kHostMemoryAlreadyRegistered = 712;

  // Throws std::runtime_error when there is no driver here.
  static const CudaLibrary& get();

  // Throws with the error's name and `what`.
  void check(Result result, const char* what) const;
  std::string error_name(Result result) const;

  Result (*init)(unsigned flags);
  Result (*device_get)(Device* device, int ordinal);
  Result (*device_get_pci_bus_id)(char* id, int nbytes, Device device);
  Result (*primary_context_retain)(Context* context, Device device);
  Result (*primary_context_release)(Device device);
  Result (*context_push)(Context context);
  Result (*context_pop)(Context* context);
  Result (*stream_create)(Stream* stream, unsigned flags);
  Result (*stream_destroy)(Stream stream);
  Result (*stream_wait_event)(Stream stream, Event event, unsigned flags);
  Result (*event_create)(Event* event, unsigned flags);
  Result (*event_destroy)(Event event);
  Result (*event_record)(Event event, Stream stream);
  Result (*event_query)(Event event);
  Result (*event_synchronize)(Event event);
  Result (*copy_to_host)(void* host, Pointer device, size_t nbytes, Stream stream);
  Result (*copy_to_device)(Pointer device, const void* host, size_t nbytes, Stream stream);
  Result (*host_register)(void* address, size_t nbytes, unsigned flags);
  Result (*host_unregister)(void* address);
  // Of the calling thread: `mode` gets what it was.
  Result (*exchange_capture_mode)(int* mode);
  Result (*get_error_name)(Result result, const char** name);

 private:
  CudaLibrary();
};

}  // namespace ssdtrain
