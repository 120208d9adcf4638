// A stand-in for libcuda.so.1, so that the real kvikio runs on a machine without a GPU: the driver calls it needs, over
// host memory. Device memory is real in one sense: its addresses are mapped without any permission, and only the copy
// functions here know where the bytes are. Whoever touches it as host memory dies of SIGSEGV.
//
// STUB_COPY_ERROR=700 makes every copy fail with that code, STUB_REGISTER_ERROR=2 the pinning of host memory. What streams
// are told is written down in order: see stub_log(). cuFile is not played: kvikio takes its POSIX path.
#define _GNU_SOURCE
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

typedef int CUresult;
typedef uintptr_t CUdeviceptr;
enum { OK = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_FOUND = 500, MAX_RANGES = 256 };
enum { CONTEXT = 1, MEMORY_TYPE = 2, DEVICE_POINTER = 3, DEVICE_ORDINAL = 9, TYPE_DEVICE = 2 };

typedef struct {
  CUdeviceptr address;
  char* bytes;
  size_t nbytes;
} Range;

static Range ranges[MAX_RANGES];
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static __thread void* current;
static int context;  // its address is the one context there is

static char told[1 << 20];
static size_t told_nbytes;

const char* stub_log(void) { return told; }

static void note(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  pthread_mutex_lock(&mutex);
  told_nbytes += vsnprintf(told + told_nbytes, sizeof(told) - told_nbytes, format, arguments);
  if (told_nbytes >= sizeof(told)) told_nbytes = sizeof(told) - 1;
  pthread_mutex_unlock(&mutex);
  va_end(arguments);
}

static int find(CUdeviceptr address, Range* found) {
  pthread_mutex_lock(&mutex);
  int hit = 0;
  for (int i = 0; i < MAX_RANGES && !hit; ++i) {
    if (ranges[i].nbytes && address - ranges[i].address < ranges[i].nbytes) *found = ranges[i], hit = 1;
  }
  pthread_mutex_unlock(&mutex);
  return hit;
}

static char* host_side(CUdeviceptr address) {
  Range range;
  return find(address, &range) ? range.bytes + (address - range.address) : (char*)address;
}

static CUresult copy(CUdeviceptr to, CUdeviceptr from, size_t nbytes) {
  const char* error = getenv("STUB_COPY_ERROR");
  if (error) return atoi(error);
  memcpy(host_side(to), host_side(from), nbytes);
  return OK;
}

CUresult cuMemAlloc_v2(CUdeviceptr* address, size_t nbytes) {
  pthread_mutex_lock(&mutex);
  CUresult result = OUT_OF_MEMORY;
  for (int i = 0; i < MAX_RANGES && result; ++i) {
    if (ranges[i].nbytes) continue;
    ranges[i].bytes = calloc(1, nbytes);
    ranges[i].address = (CUdeviceptr)mmap(NULL, nbytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    ranges[i].nbytes = nbytes;
    *address = ranges[i].address;
    result = OK;
  }
  pthread_mutex_unlock(&mutex);
  return result;
}

CUresult cuMemFree_v2(CUdeviceptr address) {
  pthread_mutex_lock(&mutex);
  CUresult result = INVALID_VALUE;
  for (int i = 0; i < MAX_RANGES; ++i) {
    if (!ranges[i].nbytes || ranges[i].address != address) continue;
    free(ranges[i].bytes);
    munmap((void*)address, ranges[i].nbytes);
    ranges[i].nbytes = 0;
    result = OK;
  }
  pthread_mutex_unlock(&mutex);
  return result;
}

CUresult cuMemcpyAsync(CUdeviceptr to, CUdeviceptr from, size_t nbytes, void* stream) { return copy(to, from, nbytes); }
CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr to, void* from, size_t nbytes, void* stream) {
  note("in %p\n", stream);
  return copy(to, (CUdeviceptr)from, nbytes);
}
CUresult cuMemcpyDtoHAsync_v2(void* to, CUdeviceptr from, size_t nbytes, void* stream) {
  note("out %p\n", stream);
  return copy((CUdeviceptr)to, from, nbytes);
}
CUresult cuMemcpyBatchAsync_v2(CUdeviceptr* to, CUdeviceptr* from, size_t* nbytes, size_t count, void* attributes,
                               size_t* indices, size_t num_attributes, void* stream) {
  CUresult result = OK;
  for (size_t i = 0; i < count && !result; ++i) result = copy(to[i], from[i], nbytes[i]);
  return result;
}

CUresult cuPointerGetAttribute(void* data, int attribute, CUdeviceptr address) {
  Range range;
  int is_device = find(address, &range);
  if (attribute == MEMORY_TYPE) return *(int*)data = is_device ? TYPE_DEVICE : 0, OK;
  if (!is_device) return INVALID_VALUE;
  if (attribute == CONTEXT) return *(void**)data = &context, OK;
  if (attribute == DEVICE_POINTER) return *(CUdeviceptr*)data = address, OK;
  if (attribute == DEVICE_ORDINAL) return *(int*)data = 0, OK;
  return INVALID_VALUE;
}
CUresult cuPointerGetAttributes(unsigned num, int* attributes, void** data, CUdeviceptr address) {
  CUresult result = OK;
  for (unsigned i = 0; i < num && !result; ++i) result = cuPointerGetAttribute(data[i], attributes[i], address);
  return result;
}
CUresult cuMemGetAddressRange_v2(CUdeviceptr* base, size_t* nbytes, CUdeviceptr address) {
  Range range;
  if (!find(address, &range)) return INVALID_VALUE;
  *base = range.address;
  *nbytes = range.nbytes;
  return OK;
}

CUresult cuMemHostAlloc(void** memory, size_t nbytes, unsigned flags) {
  return posix_memalign(memory, 4096, nbytes) ? OUT_OF_MEMORY : OK;
}
CUresult cuMemFreeHost(void* memory) { return free(memory), OK; }

CUresult cuInit(unsigned flags) { return OK; }
CUresult cuDriverGetVersion(int* version) { return *version = 13000, OK; }
CUresult cuDeviceGet(int* device, int ordinal) { return *device = ordinal, ordinal ? INVALID_VALUE : OK; }
CUresult cuDeviceGetCount(int* count) { return *count = 1, OK; }
CUresult cuDeviceGetAttribute(int* value, int attribute, int device) { return *value = 0, OK; }
CUresult cuDevicePrimaryCtxRetain(void** out, int device) { return *out = &context, OK; }
CUresult cuCtxPushCurrent_v2(void* pushed) { return current = pushed, OK; }
CUresult cuCtxPopCurrent_v2(void** popped) { return *popped = current, current = NULL, OK; }
CUresult cuCtxGetCurrent(void** out) { return *out = current, OK; }
CUresult cuCtxGetDevice(int* device) { return *device = 0, OK; }
CUresult cuDeviceGetPCIBusId(char* id, int nbytes, int device) { return snprintf(id, nbytes, "0000:00:00.0"), OK; }
CUresult cuStreamCreate(void** stream, unsigned flags) { return *stream = malloc(1), OK; }
CUresult cuStreamDestroy_v2(void* stream) { return free(stream), OK; }
CUresult cuStreamWaitEvent(void* stream, void* event, unsigned flags) { return note("wait %p %p\n", stream, event), OK; }
CUresult cuEventCreate(void** event, unsigned flags) { return *event = malloc(1), OK; }
CUresult cuEventDestroy_v2(void* event) { return free(event), OK; }
static __thread int capture_mode;  // 0: global, 2: relaxed
CUresult cuThreadExchangeStreamCaptureMode(int* mode) {
  int old = capture_mode;
  return capture_mode = *mode, *mode = old, OK;
}
CUresult cuEventRecord(void* event, void* stream) { return note("record %p %p\n", stream, event), OK; }
CUresult cuMemHostRegister_v2(void* address, size_t nbytes, unsigned flags) {
  const char* error = getenv("STUB_REGISTER_ERROR");
  return error ? atoi(error) : OK;
}
CUresult cuGetErrorName(CUresult error, const char** text) { return *text = "CUDA_ERROR_STUB", OK; }
CUresult cuGetErrorString(CUresult error, const char** text) { return *text = "played by the stub", OK; }

// What kvikio looks up and these tests never need more of than success.
#define SUCCEEDS(name) \
  CUresult name() { return OK; }
SUCCEEDS(cuMemHostUnregister)
SUCCEEDS(cuCtxCreate_v2)
SUCCEEDS(cuCtxCreate_v4)
SUCCEEDS(cuCtxDestroy_v2)
SUCCEEDS(cuDevicePrimaryCtxRelease_v2)
SUCCEEDS(cuStreamSynchronize)
SUCCEEDS(cuEventSynchronize)
SUCCEEDS(cuEventQuery)
SUCCEEDS(cuLaunchHostFunc)
