// Kernels: host callbacks that Python queues. PyTorch's own are known by name and are not there, but for the one that
// lets the device wait.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "standin.h"

static const void* spin_kernel;  // torch.cuda._sleep
static int fat_binary;

// Returns 1 where the callback went into a graph, which may call it any number of times; otherwise it runs once.
int standin_enqueue(void* handle, void (*call)(void*), void* data) {
  Stream* stream = standin_stream(handle);
  Work* work = standin_work(CALL);
  work->call = call;
  work->data = data;
  int is_captured = stream->capture != NULL;
  cudaError_t error = standin_put(stream, work);
  return error != cudaSuccess ? -(int)error : is_captured;
}

cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* data) {
  return standin_result(standin_enqueue(stream, function, data) < 0 ? cudaErrorStreamCaptureInvalidated : cudaSuccess);
}

// -- launches -------------------------------------------------------------------------------------

static void sleep_for(void* data) {
  int64_t nanoseconds = (int64_t)(intptr_t)data;
  struct timespec time = {nanoseconds / 1000000000, nanoseconds % 1000000000};
  nanosleep(&time, NULL);
}

static cudaError_t launch(const void* function, void** arguments, cudaStream_t stream) {
  if (function != spin_kernel) {
    if (getenv("STANDIN_VERBOSE")) fprintf(stderr, "stand-in: no kernel %p\n", function);
    return standin_result(cudaErrorInvalidDeviceFunction);
  }
  int64_t cycles = *(int64_t*)arguments[0];  // one a nanosecond
  return cudaLaunchHostFunc(stream, sleep_for, (void*)(intptr_t)cycles);
}

cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** arguments, size_t shared_nbytes,
                             cudaStream_t stream) {
  return launch(function, arguments, stream);
}

cudaError_t __cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** arguments, size_t shared_nbytes,
                               cudaStream_t stream) {
  return launch(function, arguments, stream);
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* configuration, const void* function, void** arguments) {
  return launch(function, arguments, configuration->stream);
}

cudaError_t cudaLaunchCooperativeKernel(const void* function, dim3 grid, dim3 block, void** arguments,
                                        size_t shared_nbytes, cudaStream_t stream) {
  return launch(function, arguments, stream);
}

// -- what compiled code calls round a launch and when it is loaded ----------------------------------

static __thread struct {
  dim3 grid, block;
  size_t shared_nbytes;
  void* stream;
} pushed;

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared_nbytes, struct CUstream_st* stream) {
  pushed.grid = grid;
  pushed.block = block;
  pushed.shared_nbytes = shared_nbytes;
  pushed.stream = stream;
  return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared_nbytes, void* stream) {
  *grid = pushed.grid;
  *block = pushed.block;
  *shared_nbytes = pushed.shared_nbytes;
  *(void**)stream = pushed.stream;
  return cudaSuccess;
}

void** __cudaRegisterFatBinary(void* binary) {
  return (void**)&fat_binary;
}

void __cudaRegisterFatBinaryEnd(void** handle) {}

void __cudaUnregisterFatBinary(void** handle) {}

void __cudaRegisterFunction(void** handle, const char* function, char* device_function, const char* name, int limit,
                            void* thread, void* block, void* block_size, void* grid_size, int* warp_size) {
  if (strstr(name, "spin_kernel") != NULL) spin_kernel = function;
}

void __cudaRegisterVar(void** handle, char* variable, char* address, const char* name, int is_external, size_t nbytes,
                       int is_constant, int is_global) {}

char __cudaInitModule(void** handle) {
  return 1;
}

cudaError_t __cudaGetKernel(void** kernel, const void* function) {
  *kernel = (void*)function;
  return cudaSuccess;
}
