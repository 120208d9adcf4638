// Streams and events. A stream is a thread that does what was queued, in order, after random delays if asked for.
#define _GNU_SOURCE
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "standin.h"

pthread_mutex_t standin_lock = PTHREAD_MUTEX_INITIALIZER;
pthread_cond_t standin_progress = PTHREAD_COND_INITIALIZER;

static size_t longest_queue;  // STANDIN_QUEUE=1024: a launch blocks while so many works are queued on its stream

static Stream default_streams[MAX_DEVICES];
static Stream* all_streams;
static unsigned num_streams;

static double now(void) {
  struct timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return time.tv_sec + time.tv_nsec * 1e-9;
}

// STANDIN_DELAY_US=400: one work in four begins up to 400 us late, by a seed of each stream.
static void delay(Stream* stream) {
  static int longest = -1;
  if (longest < 0) longest = getenv("STANDIN_DELAY_US") ? atoi(getenv("STANDIN_DELAY_US")) : 0;
  if (longest > 0 && rand_r(&stream->seed) % 4 == 0) usleep(rand_r(&stream->seed) % longest);
}

// -- works ----------------------------------------------------------------------------------------

Work* standin_work(Kind kind) {
  Work* work = calloc(1, sizeof(Work));
  work->kind = kind;
  return work;
}

static Point* use(Point* point) {
  if (point != NULL) ++point->num_users;
  return point;
}

static void release(Point* point) {
  if (point != NULL && --point->num_users == 0) free(point);
}

static bool is_reached(const Point* point) {
  return point == NULL || point->is_reached;
}

static void forget(Work* work) {
  release(work->point);
  free(work);
}

static void perform(Work* work) {
  if (work->kind == COPY) memmove(work->to, work->from, work->nbytes);
  if (work->kind == SET) memset(work->to, work->value, work->nbytes);
  if (work->kind == CALL) work->call(work->data);
}

static void reach(Point* point) {
  point->is_reached = true;
  point->seconds = now();
}

static void* run(void* argument) {
  Stream* stream = argument;
  pthread_mutex_lock(&standin_lock);
  while (true) {
    while (stream->first == NULL && !stream->is_destroyed) pthread_cond_wait(&stream->has_work, &standin_lock);
    Work* work = stream->first;
    if (work == NULL) break;
    while (work->kind == WAIT && !is_reached(work->point)) pthread_cond_wait(&standin_progress, &standin_lock);
    pthread_mutex_unlock(&standin_lock);
    delay(stream);
    perform(work);
    pthread_mutex_lock(&standin_lock);
    if (work->kind == RECORD) reach(work->point);
    stream->first = work->next;
    if (stream->first == NULL) stream->last = NULL;
    ++stream->num_done;
    forget(work);
    pthread_cond_broadcast(&standin_progress);
  }
  pthread_mutex_unlock(&standin_lock);
  return NULL;
}

// -- queues ---------------------------------------------------------------------------------------

static void prepare(Stream* stream, int device) {
  pthread_cond_init(&stream->has_work, NULL);
  stream->device = device;
  stream->seed = ++num_streams;
  stream->next = all_streams;
  all_streams = stream;
}

Stream* standin_new_stream(void) {
  Stream* stream = calloc(1, sizeof(Stream));  // never freed: somebody may still wait for what it did
  pthread_mutex_lock(&standin_lock);
  prepare(stream, standin_device());
  pthread_mutex_unlock(&standin_lock);
  return stream;
}

// 0, 1 (legacy) and 2 (per thread) are the current device's default stream.
Stream* standin_stream(void* handle) {
  if ((size_t)handle > 2) return handle;
  Stream* stream = &default_streams[standin_device()];
  pthread_mutex_lock(&standin_lock);
  if (stream->seed == 0) prepare(stream, standin_device());
  pthread_mutex_unlock(&standin_lock);
  return stream;
}

static void wait_for_room(Stream* stream) {
  if (longest_queue == 0) longest_queue = getenv("STANDIN_QUEUE") ? (size_t)atol(getenv("STANDIN_QUEUE")) : SIZE_MAX;
  while (stream->num_queued - stream->num_done >= longest_queue) {
    pthread_cond_wait(&standin_progress, &standin_lock);
  }
}

void standin_start(Stream* stream, Work* work) {
  wait_for_room(stream);
  if (!stream->has_thread) {
    pthread_t thread;
    pthread_create(&thread, NULL, run, stream);
    pthread_detach(thread);
    stream->has_thread = true;
  }
  work->next = NULL;
  if (stream->last != NULL) {
    stream->last->next = work;
  } else {
    stream->first = work;
  }
  stream->last = work;
  ++stream->num_queued;
  pthread_cond_signal(&stream->has_work);
}

cudaError_t standin_put(Stream* stream, Work* work) {
  pthread_mutex_lock(&standin_lock);
  cudaError_t error = cudaSuccess;
  if (stream->capture != NULL) {
    error = standin_capture(stream, work);
  } else {
    standin_start(stream, work);
  }
  pthread_mutex_unlock(&standin_lock);
  return error;
}

void standin_end_joined(const Graph* graph) {
  for (Stream* stream = all_streams; stream != NULL; stream = stream->next) {
    if (stream->capture == graph) stream->capture = NULL;
  }
}

static void wait_for(Stream* stream) {
  uint64_t number = stream->num_queued;
  while (stream->num_done < number) pthread_cond_wait(&standin_progress, &standin_lock);
}

void standin_drain(Stream* stream) {
  pthread_mutex_lock(&standin_lock);
  wait_for(stream);
  pthread_mutex_unlock(&standin_lock);
}

// All that is queued by now, whoever is capturing: no call of a program.
void standin_drain_all(void) {
  pthread_mutex_lock(&standin_lock);
  for (Stream* stream = all_streams; stream != NULL; stream = stream->next) wait_for(stream);
  pthread_mutex_unlock(&standin_lock);
}

// -- streams of the runtime -----------------------------------------------------------------------

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int priority) {
  cudaError_t error = standin_begin();
  if (error == cudaSuccess) *stream = (cudaStream_t)standin_new_stream();
  return error;
}

cudaError_t cudaStreamCreate(cudaStream_t* stream) {
  return cudaStreamCreateWithPriority(stream, 0, 0);
}

cudaError_t cudaStreamDestroy(cudaStream_t handle) {
  Stream* stream = standin_stream(handle);
  pthread_mutex_lock(&standin_lock);
  stream->is_destroyed = true;
  pthread_cond_signal(&stream->has_work);
  pthread_mutex_unlock(&standin_lock);
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
  cudaError_t error = standin_unsafe("cudaStreamSynchronize");
  if (error == cudaSuccess) standin_drain(standin_stream(handle));
  return standin_result(error);
}

cudaError_t cudaStreamQuery(cudaStream_t handle) {
  cudaError_t error = standin_unsafe("cudaStreamQuery");
  if (error != cudaSuccess) return standin_result(error);
  Stream* stream = standin_stream(handle);
  pthread_mutex_lock(&standin_lock);
  bool is_done = stream->num_done == stream->num_queued;
  pthread_mutex_unlock(&standin_lock);
  return is_done ? cudaSuccess : cudaErrorNotReady;
}

cudaError_t cudaStreamGetPriority(cudaStream_t stream, int* priority) {
  *priority = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0;
  *greatest = -5;
  return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize(void) {
  cudaError_t error = standin_begin();
  if (error == cudaSuccess) error = standin_unsafe("cudaDeviceSynchronize");
  if (error != cudaSuccess) return standin_result(error);
  pthread_mutex_lock(&standin_lock);
  for (Stream* stream = all_streams; stream != NULL; stream = stream->next) {
    if (stream->device == standin_device()) wait_for(stream);
  }
  pthread_mutex_unlock(&standin_lock);
  return cudaSuccess;
}

// -- events ---------------------------------------------------------------------------------------

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* handle, unsigned flags) {
  cudaError_t error = standin_begin();
  if (error != cudaSuccess) return error;
  Event* event = calloc(1, sizeof(Event));
  event->flags = flags;
  *handle = (cudaEvent_t)event;
  return cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t* event) {
  return cudaEventCreateWithFlags(event, 0);
}

cudaError_t cudaEventDestroy(cudaEvent_t handle) {
  Event* event = (Event*)handle;
  pthread_mutex_lock(&standin_lock);
  release(event->point);
  pthread_mutex_unlock(&standin_lock);
  free(event);
  return cudaSuccess;
}

static Work* about(Kind kind, Event* event) {
  Work* work = standin_work(kind);
  work->point = use(event->point);
  return work;
}

// In a capture it marks a point of the graph, which replays in one order anyway.
cudaError_t cudaEventRecord(cudaEvent_t handle, cudaStream_t on) {
  Stream* stream = standin_stream(on);
  Event* event = (Event*)handle;
  pthread_mutex_lock(&standin_lock);
  event->capture = stream->capture;
  if (stream->capture == NULL) {
    release(event->point);
    event->point = use(calloc(1, sizeof(Point)));
    standin_start(stream, about(RECORD, event));
  }
  pthread_mutex_unlock(&standin_lock);
  return cudaSuccess;
}

cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) {
  return cudaEventRecord(event, stream);
}

// A stream that waits for a point of a capture joins the capture; a capture cannot wait for what is outside.
cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t point, unsigned flags) {
  Stream* stream = standin_stream(handle);
  Event* event = (Event*)point;
  cudaError_t error = cudaSuccess;
  pthread_mutex_lock(&standin_lock);
  bool is_captured = event->capture != NULL && event->capture->is_active;
  if (stream->capture != NULL && event->capture != stream->capture) {
    standin_invalidate(stream->capture);
    error = cudaErrorStreamCaptureIsolation;
  } else if (is_captured) {
    stream->capture = event->capture;
  } else if (event->capture == NULL) {
    standin_start(stream, about(WAIT, event));
  }
  pthread_mutex_unlock(&standin_lock);
  return standin_result(error);
}

static cudaError_t look_at(Event* event, const char* call) {
  cudaError_t error = standin_unsafe(call);
  if (error == cudaSuccess && event->capture != NULL && event->capture->is_active) error = cudaErrorCapturedEvent;
  return error;
}

cudaError_t cudaEventQuery(cudaEvent_t handle) {
  Event* event = (Event*)handle;
  cudaError_t error = look_at(event, "cudaEventQuery");
  if (error != cudaSuccess) return standin_result(error);
  pthread_mutex_lock(&standin_lock);
  bool is_over = is_reached(event->point);
  pthread_mutex_unlock(&standin_lock);
  return is_over ? cudaSuccess : cudaErrorNotReady;
}

cudaError_t cudaEventSynchronize(cudaEvent_t handle) {
  Event* event = (Event*)handle;
  cudaError_t error = look_at(event, "cudaEventSynchronize");
  if (error != cudaSuccess) return standin_result(error);
  pthread_mutex_lock(&standin_lock);
  Point* point = use(event->point);
  while (!is_reached(point)) pthread_cond_wait(&standin_progress, &standin_lock);
  release(point);
  pthread_mutex_unlock(&standin_lock);
  return cudaSuccess;
}

cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t begin, cudaEvent_t end) {
  Event *first = (Event*)begin, *second = (Event*)end;
  if ((first->flags | second->flags) & cudaEventDisableTiming) return standin_result(cudaErrorInvalidResourceHandle);
  if (first->point == NULL || second->point == NULL) return standin_result(cudaErrorInvalidResourceHandle);
  pthread_mutex_lock(&standin_lock);
  bool are_reached = is_reached(first->point) && is_reached(second->point);
  *milliseconds = (float)((second->point->seconds - first->point->seconds) * 1e3);
  pthread_mutex_unlock(&standin_lock);
  return are_reached ? cudaSuccess : cudaErrorNotReady;
}
