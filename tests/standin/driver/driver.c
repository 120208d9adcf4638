// The driver's functions, which ssdtrain's engine calls by name, and PyTorch through the runtime. Its error codes are
// the runtime's, whose last error they leave alone.
#define _GNU_SOURCE
#include <dlfcn.h>

#include "standin.h"

typedef int Result;

#define QUIETLY(call)                       \
  ({                                        \
    cudaError_t before = cudaPeekAtLastError(); \
    cudaError_t result = (call);            \
    standin_set_last_error(before);         \
    result;                                 \
  })

static int contexts[MAX_DEVICES];

static int device_of(void* context) {
  return (int)((int*)context - contexts);
}

cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned version,
                                             unsigned long long flags, enum cudaDriverEntryPointQueryResult* status) {
  *function = dlsym(RTLD_DEFAULT, name);
  if (status != NULL) *status = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

// -- devices and contexts -------------------------------------------------------------------------

Result cuInit(unsigned flags) {
  return standin_begin();
}

Result cuDriverGetVersion(int* version) {
  return cudaDriverGetVersion(version);
}

Result cuDeviceGet(int* device, int index) {
  *device = index;
  return index < standin_num_devices() ? cudaSuccess : cudaErrorInvalidDevice;
}

Result cuDeviceGetCount(int* count) {
  return QUIETLY(cudaGetDeviceCount(count));
}

Result cuDeviceGetAttribute(int* value, int attribute, int device) {
  return cudaDeviceGetAttribute(value, (enum cudaDeviceAttr)attribute, device);
}

Result cuDeviceGetPCIBusId(char* id, int nbytes, int device) {
  return cudaDeviceGetPCIBusId(id, nbytes, device);
}

Result cuDevicePrimaryCtxRetain(void** context, int device) {
  *context = &contexts[device];
  return standin_begin();
}

Result cuDevicePrimaryCtxRelease_v2(int device) {
  return cudaSuccess;
}

Result cuDevicePrimaryCtxGetState(int device, unsigned* flags, int* is_active) {
  *flags = 0;
  *is_active = 1;
  return cudaSuccess;
}

Result cuCtxPushCurrent_v2(void* context) {
  return standin_push_device(device_of(context));
}

Result cuCtxPopCurrent_v2(void** context) {
  int device = standin_pop_device();
  if (device < 0) return cudaErrorDeviceUninitialized;
  *context = &contexts[device];
  return cudaSuccess;
}

Result cuCtxGetCurrent(void** context) {
  *context = &contexts[standin_device()];
  return cudaSuccess;
}

Result cuCtxSetCurrent(void* context) {
  return QUIETLY(cudaSetDevice(device_of(context)));
}

// -- streams and events ---------------------------------------------------------------------------

Result cuStreamCreate(cudaStream_t* stream, unsigned flags) {
  return cudaStreamCreateWithPriority(stream, flags, 0);
}

Result cuStreamDestroy_v2(cudaStream_t stream) {
  return cudaStreamDestroy(stream);
}

Result cuStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) {
  return QUIETLY(cudaStreamWaitEvent(stream, event, flags));
}

Result cuStreamSynchronize(cudaStream_t stream) {
  return QUIETLY(cudaStreamSynchronize(stream));
}

Result cuStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus* status) {
  return cudaStreamIsCapturing(stream, status);
}

Result cuThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode* mode) {
  return cudaThreadExchangeStreamCaptureMode(mode);
}

Result cuEventCreate(cudaEvent_t* event, unsigned flags) {
  return cudaEventCreateWithFlags(event, flags);
}

Result cuEventDestroy_v2(cudaEvent_t event) {
  return cudaEventDestroy(event);
}

Result cuEventRecord(cudaEvent_t event, cudaStream_t stream) {
  return cudaEventRecord(event, stream);
}

Result cuEventQuery(cudaEvent_t event) {
  return QUIETLY(cudaEventQuery(event));
}

Result cuEventSynchronize(cudaEvent_t event) {
  return QUIETLY(cudaEventSynchronize(event));
}

// -- memory ---------------------------------------------------------------------------------------

Result cuMemcpyDtoHAsync_v2(void* to, unsigned long long from, size_t nbytes, void* stream) {
  return standin_copy(to, (const void*)from, nbytes, stream);
}

Result cuMemcpyHtoDAsync_v2(unsigned long long to, const void* from, size_t nbytes, void* stream) {
  return standin_copy((void*)to, from, nbytes, stream);
}

Result cuMemHostRegister_v2(void* address, size_t nbytes, unsigned flags) {
  return QUIETLY(cudaHostRegister(address, nbytes, flags));
}

Result cuMemHostUnregister(void* address) {
  return QUIETLY(cudaHostUnregister(address));
}

Result cuGetErrorName(Result error, const char** name) {
  *name = cudaGetErrorName((cudaError_t)error);
  return cudaSuccess;
}

Result cuGetErrorString(Result error, const char** text) {
  *text = cudaGetErrorString((cudaError_t)error);
  return cudaSuccess;
}
