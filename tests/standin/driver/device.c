// Devices: how many, which is current, what they are like; errors; what a forked child may not do.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "standin.h"

#define MAX_PUSHED 64

static pthread_once_t is_prepared = PTHREAD_ONCE_INIT;
static int num_devices = 1;
static bool is_forked;
static long counters[NUM_COUNTERS];
static __thread int devices[MAX_PUSHED + 1], num_pushed;  // the last one is current
static __thread cudaError_t last_error;

// -- beginnings -----------------------------------------------------------------------------------

// The threads of the streams are not in a child, and a lock may be held for ever.
static void forked(void) {
  is_forked = true;
  pthread_mutex_init(&standin_lock, NULL);
}

static void prepare(void) {
  const char* number = getenv("STANDIN_DEVICES");
  if (number != NULL) num_devices = atoi(number);
  if (num_devices > MAX_DEVICES) num_devices = MAX_DEVICES;
  pthread_atfork(NULL, NULL, forked);
}

cudaError_t standin_begin(void) {
  pthread_once(&is_prepared, prepare);
  return is_forked ? cudaErrorInitializationError : cudaSuccess;
}

void standin_add(Counter counter) {
  ++counters[counter];
}

long standin_count(Counter counter) {
  return counters[counter];
}

// -- current --------------------------------------------------------------------------------------

int standin_num_devices(void) {
  standin_begin();
  return num_devices;
}

int standin_device(void) {
  return devices[num_pushed];
}

cudaError_t standin_push_device(int device) {
  if (num_pushed == MAX_PUSHED) return cudaErrorInvalidValue;
  devices[++num_pushed] = device;
  return cudaSuccess;
}

int standin_pop_device(void) {
  return num_pushed == 0 ? -1 : devices[num_pushed--];
}

cudaError_t cudaGetDeviceCount(int* count) {
  *count = standin_num_devices();
  return standin_result(standin_begin());
}

cudaError_t cudaGetDevice(int* device) {
  *device = standin_device();
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  cudaError_t error = standin_begin();
  if (error == cudaSuccess && (device < 0 || device >= num_devices)) error = cudaErrorInvalidDevice;
  if (error == cudaSuccess) devices[num_pushed] = device;
  return standin_result(error);
}

// -- what they are like ---------------------------------------------------------------------------

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp* properties, int device) {
  size_t free_nbytes;
  memset(properties, 0, sizeof(*properties));
  strcpy(properties->name, "Stand-in");
  cudaMemGetInfo(&free_nbytes, &properties->totalGlobalMem);
  properties->major = 9;
  properties->warpSize = 32;
  properties->multiProcessorCount = 2;
  properties->maxThreadsPerMultiProcessor = 2048;
  properties->maxThreadsPerBlock = 1024;
  properties->sharedMemPerBlock = 48 << 10;
  properties->sharedMemPerBlockOptin = 227 << 10;
  properties->unifiedAddressing = properties->canMapHostMemory = 1;
  properties->pciBusID = device;
  for (int axis = 0; axis < 3; ++axis) {
    properties->maxGridSize[axis] = 65535;
    properties->maxThreadsDim[axis] = 1024;
  }
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, enum cudaDeviceAttr attribute, int device) {
  *value = attribute == cudaDevAttrComputeCapabilityMajor ? 9 : attribute == cudaDevAttrMultiProcessorCount ? 2 : 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetPCIBusId(char* id, int nbytes, int device) {
  snprintf(id, (size_t)nbytes, "0000:%02x:00.0", (unsigned)device);
  return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}

cudaError_t cudaDeviceCanAccessPeer(int* can, int device, int peer) {
  *can = 1;
  return cudaSuccess;
}

cudaError_t cudaDeviceEnablePeerAccess(int peer, unsigned flags) {
  return cudaSuccess;
}

cudaError_t cudaProfilerStart(void) {
  return cudaSuccess;
}

cudaError_t cudaProfilerStop(void) {
  return cudaSuccess;
}

// -- errors ---------------------------------------------------------------------------------------

cudaError_t standin_result(cudaError_t error) {
  if (error != cudaSuccess && error != cudaErrorNotReady) last_error = error;
  return error;
}

void standin_set_last_error(cudaError_t error) {
  last_error = error;
}

cudaError_t cudaGetLastError(void) {
  cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}

cudaError_t cudaPeekAtLastError(void) {
  return last_error;
}

const char* cudaGetErrorName(cudaError_t error) {
  static __thread char name[32];
  snprintf(name, sizeof(name), "CUDA_ERROR_%d", (int)error);
  return error == cudaErrorMemoryAllocation ? "cudaErrorMemoryAllocation" : name;
}

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorInitializationError: return "initialization error";
    case cudaErrorInvalidDeviceFunction: return "the stand-in has no such kernel";
    case cudaErrorNotSupported: return "not supported by the stand-in";
    case cudaErrorStreamCaptureUnsupported: return "operation not permitted when stream is capturing";
    case cudaErrorStreamCaptureInvalidated: return "operation failed due to a previous error during capture";
    case cudaErrorStreamCaptureIsolation: return "dependency created on uncaptured work in another stream";
    default: return cudaGetErrorName(error);
  }
}
