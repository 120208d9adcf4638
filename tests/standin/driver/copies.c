// Copies, as CUDA has them: past the host's time where the host side is pinned, and in it where it is not.
#include <stdlib.h>
#include <string.h>

#include "standin.h"

static cudaError_t queue(void* to, const void* from, size_t nbytes, Stream* stream) {
  Work* work = standin_work(COPY);
  work->to = to;
  work->from = from;
  work->nbytes = nbytes;
  return standin_put(stream, work);
}

static void count(Counter counter) {
  pthread_mutex_lock(&standin_lock);
  standin_add(counter);
  pthread_mutex_unlock(&standin_lock);
}

cudaError_t standin_copy(void* to, const void* from, size_t nbytes, void* handle) {
  cudaError_t error = standin_begin();
  if (error != cudaSuccess || nbytes == 0) return error;
  Stream* stream = standin_stream(handle);
  bool is_out = standin_place(from) == DEVICE && standin_place(to) != DEVICE;
  bool is_in = standin_place(from) != DEVICE && standin_place(to) == DEVICE;
  if (is_out || is_in) count(is_out ? OUT : IN);
  const void* host = is_out ? to : is_in ? from : NULL;
  if (host != NULL && standin_crosses(host, nbytes)) {
    count(CROSSING);
    return cudaErrorInvalidValue;
  }
  error = queue(to, from, nbytes, stream);
  if (host != NULL && standin_place(host) == PAGEABLE) {
    count(UNPINNED);
    if (error == cudaSuccess) standin_drain(stream);
  }
  return error;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t nbytes, enum cudaMemcpyKind kind, cudaStream_t stream) {
  return standin_result(standin_copy(to, from, nbytes, stream));
}

cudaError_t cudaMemcpy(void* to, const void* from, size_t nbytes, enum cudaMemcpyKind kind) {
  cudaError_t error = standin_unsafe("cudaMemcpy");
  if (error == cudaSuccess) error = standin_copy(to, from, nbytes, NULL);
  if (error == cudaSuccess) standin_drain(standin_stream(NULL));
  return standin_result(error);
}

cudaError_t cudaMemcpyPeerAsync(void* to, int to_device, const void* from, int from_device, size_t nbytes,
                                cudaStream_t stream) {
  return standin_result(standin_copy(to, from, nbytes, stream));
}

cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width,
                              size_t height, enum cudaMemcpyKind kind, cudaStream_t stream) {
  cudaError_t error = cudaSuccess;
  for (size_t row = 0; row < height && error == cudaSuccess; ++row) {
    error = standin_copy((char*)to + row * to_pitch, (const char*)from + row * from_pitch, width, stream);
  }
  return standin_result(error);
}

cudaError_t cudaMemsetAsync(void* to, int value, size_t nbytes, cudaStream_t stream) {
  Work* work = standin_work(SET);
  work->to = to;
  work->value = value;
  work->nbytes = nbytes;
  return standin_result(standin_put(standin_stream(stream), work));
}

cudaError_t cudaMemset(void* to, int value, size_t nbytes) {
  return cudaMemsetAsync(to, value, nbytes, NULL);
}
