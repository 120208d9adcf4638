// Memory of the device, pinned memory, and which address belongs to what. All of it is host memory.
#define _GNU_SOURCE
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "standin.h"

#define DEVICE_NBYTES ((size_t)8 << 30)

typedef struct {
  char* address;
  size_t nbytes;
  Place place;
  int device;
} Range;

static Range* ranges;  // by address
static size_t num_ranges, num_allocated;
static size_t used_nbytes[MAX_DEVICES];

// -- ranges, with the lock held -------------------------------------------------------------------

static size_t num_up_to(const void* address) {
  size_t low = 0, high = num_ranges;
  while (low < high) {
    size_t middle = (low + high) / 2;
    if (ranges[middle].address <= (const char*)address) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

static Range* find(const void* address) {
  size_t number = num_up_to(address);
  if (number == 0) return NULL;
  Range* range = &ranges[number - 1];
  return (const char*)address < range->address + range->nbytes ? range : NULL;
}

static void add(void* address, size_t nbytes, Place place) {
  if (num_ranges == num_allocated) {
    num_allocated = 2 * num_allocated + 64;
    ranges = realloc(ranges, num_allocated * sizeof(Range));
  }
  size_t at = num_up_to(address);
  memmove(&ranges[at + 1], &ranges[at], (num_ranges - at) * sizeof(Range));
  ranges[at] = (Range){address, nbytes, place, standin_device()};
  ++num_ranges;
}

static size_t drop(void* address) {
  Range* range = find(address);
  if (range == NULL || range->address != address) return 0;
  size_t nbytes = range->nbytes, at = (size_t)(range - ranges);
  --num_ranges;
  memmove(range, range + 1, (num_ranges - at) * sizeof(Range));
  return nbytes;
}

// -- ranges, for the other parts ------------------------------------------------------------------

Place standin_place(const void* address) {
  pthread_mutex_lock(&standin_lock);
  Range* range = find(address);
  Place place = range != NULL ? range->place : PAGEABLE;
  pthread_mutex_unlock(&standin_lock);
  return place;
}

bool standin_crosses(const void* address, size_t nbytes) {
  if (nbytes == 0) return false;
  pthread_mutex_lock(&standin_lock);
  bool crosses = find(address) != find((const char*)address + nbytes - 1);
  pthread_mutex_unlock(&standin_lock);
  return crosses;
}

void standin_add_range(void* address, size_t nbytes, Place place) {
  pthread_mutex_lock(&standin_lock);
  add(address, nbytes, place);
  pthread_mutex_unlock(&standin_lock);
}

size_t standin_remove_range(void* address) {
  pthread_mutex_lock(&standin_lock);
  size_t nbytes = drop(address);
  pthread_mutex_unlock(&standin_lock);
  return nbytes;
}

void* standin_map(size_t nbytes) {
  void* address = mmap(NULL, nbytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return address == MAP_FAILED ? NULL : address;
}

// -- of the device --------------------------------------------------------------------------------

cudaError_t cudaMalloc(void** result, size_t nbytes) {
  cudaError_t error = standin_begin();
  if (error == cudaSuccess) error = standin_unsafe("cudaMalloc");
  if (error != cudaSuccess) return standin_result(error);
  pthread_mutex_lock(&standin_lock);
  size_t* used = &used_nbytes[standin_device()];
  void* address = *used + nbytes <= DEVICE_NBYTES ? standin_map(nbytes) : NULL;
  if (address != NULL) {
    *used += nbytes;
    add(address, nbytes, DEVICE);
  }
  pthread_mutex_unlock(&standin_lock);
  *result = address;
  return standin_result(address != NULL ? cudaSuccess : cudaErrorMemoryAllocation);
}

// Waits for the device, as CUDA does.
cudaError_t cudaFree(void* address) {
  if (address == NULL) return cudaSuccess;
  cudaError_t error = cudaDeviceSynchronize();
  if (error != cudaSuccess) return error;
  pthread_mutex_lock(&standin_lock);
  Range* range = find(address);
  int device = range != NULL ? range->device : 0;
  size_t nbytes = drop(address);
  used_nbytes[device] -= nbytes;
  pthread_mutex_unlock(&standin_lock);
  if (nbytes == 0) return standin_result(cudaErrorInvalidValue);
  munmap(address, nbytes);
  return cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t* free_nbytes, size_t* total_nbytes) {
  *total_nbytes = DEVICE_NBYTES;
  *free_nbytes = DEVICE_NBYTES - used_nbytes[standin_device()];
  return cudaSuccess;
}

// -- pinned ---------------------------------------------------------------------------------------

cudaError_t cudaHostAlloc(void** address, size_t nbytes, unsigned flags) {
  cudaError_t error = standin_begin();
  if (error == cudaSuccess) error = standin_unsafe("cudaHostAlloc");
  if (error != cudaSuccess) return standin_result(error);
  *address = standin_map(nbytes);
  if (*address == NULL) return standin_result(cudaErrorMemoryAllocation);
  standin_add_range(*address, nbytes, PINNED);
  return cudaSuccess;
}

cudaError_t cudaFreeHost(void* address) {
  cudaError_t error = cudaDeviceSynchronize();
  if (error != cudaSuccess) return error;
  size_t nbytes = standin_remove_range(address);
  if (nbytes == 0) return standin_result(cudaErrorInvalidValue);
  munmap(address, nbytes);
  return cudaSuccess;
}

cudaError_t cudaHostRegister(void* address, size_t nbytes, unsigned flags) {
  cudaError_t error = standin_begin();
  if (error == cudaSuccess) error = standin_unsafe("cudaHostRegister");
  if (error != cudaSuccess) return standin_result(error);
  pthread_mutex_lock(&standin_lock);
  standin_add(REGISTERED);
  if (find(address) != NULL) {
    error = cudaErrorHostMemoryAlreadyRegistered;
  } else {
    add(address, nbytes, PINNED);
  }
  pthread_mutex_unlock(&standin_lock);
  return standin_result(error);
}

cudaError_t cudaHostUnregister(void* address) {
  return standin_result(standin_remove_range(address) > 0 ? cudaSuccess : cudaErrorHostMemoryNotRegistered);
}

cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes* attributes, const void* address) {
  memset(attributes, 0, sizeof(*attributes));
  pthread_mutex_lock(&standin_lock);
  Range* range = find(address);
  if (range != NULL) {
    attributes->type = (enum cudaMemoryType)range->place;
    attributes->device = range->device;
    attributes->devicePointer = attributes->hostPointer = (void*)address;
  }
  pthread_mutex_unlock(&standin_lock);
  return cudaSuccess;
}
