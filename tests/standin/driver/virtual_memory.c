// Addresses and memory apart, which PyTorch's expandable segments are made of: memory is a file without a name.
#define _GNU_SOURCE
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include "standin.h"

enum { OK = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2 };

int cuMemGetAllocationGranularity(size_t* granularity, const void* properties, int option) {
  *granularity = (size_t)2 << 20;
  return OK;
}

int cuMemAddressReserve(unsigned long long* address, size_t nbytes, size_t alignment, unsigned long long wanted,
                        unsigned long long flags) {
  void* reserved = mmap(NULL, nbytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (reserved == MAP_FAILED) return OUT_OF_MEMORY;
  standin_add_range(reserved, nbytes, DEVICE);
  *address = (unsigned long long)reserved;
  return OK;
}

int cuMemAddressFree(unsigned long long address, size_t nbytes) {
  standin_remove_range((void*)address);
  munmap((void*)address, nbytes);
  return OK;
}

int cuMemCreate(unsigned long long* handle, size_t nbytes, const void* properties, unsigned long long flags) {
  int descriptor = memfd_create("stand-in", MFD_CLOEXEC);
  if (descriptor < 0 || ftruncate(descriptor, (off_t)nbytes) != 0) return OUT_OF_MEMORY;
  *handle = (unsigned long long)descriptor;
  return OK;
}

int cuMemRelease(unsigned long long handle) {
  close((int)handle);
  return OK;
}

int cuMemMap(unsigned long long address, size_t nbytes, size_t offset, unsigned long long handle,
             unsigned long long flags) {
  void* mapped = mmap((void*)address, nbytes, PROT_NONE, MAP_SHARED | MAP_FIXED, (int)handle, (off_t)offset);
  return mapped == MAP_FAILED ? INVALID_VALUE : OK;
}

int cuMemUnmap(unsigned long long address, size_t nbytes) {
  int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED;
  return mmap((void*)address, nbytes, PROT_NONE, flags, -1, 0) == MAP_FAILED ? INVALID_VALUE : OK;
}

int cuMemSetAccess(unsigned long long address, size_t nbytes, const void* access, size_t num_devices) {
  return mprotect((void*)address, nbytes, PROT_READ | PROT_WRITE) != 0 ? INVALID_VALUE : OK;
}
