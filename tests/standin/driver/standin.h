// What the parts of the stand-in share: one lock, streams that are threads, events, graphs.
#pragma once

#include <cuda_runtime_api.h>
#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define MAX_DEVICES 8

typedef struct Graph Graph;
typedef struct Stream Stream;

// Guards everything below. `standin_progress` is signalled whenever a stream completes something.
extern pthread_mutex_t standin_lock;
extern pthread_cond_t standin_progress;

// One recording of an event. Who waits for it does so whatever becomes of the event.
typedef struct {
  bool is_reached;
  double seconds;      // when it was reached
  unsigned num_users;  // the event, works in queues, threads that wait
} Point;

typedef struct {
  Point* point;      // recorded last, or NULL
  unsigned flags;
  Graph* capture;    // in which it was recorded last, or NULL
} Event;

typedef enum { COPY, SET, CALL, RECORD, WAIT } Kind;

typedef struct Work {
  struct Work* next;
  Kind kind;
  void* to;            // COPY, SET
  const void* from;    // COPY
  size_t nbytes;       // COPY, SET
  int value;           // SET
  void (*call)(void*);  // CALL
  void* data;          // CALL
  Point* point;        // RECORD, WAIT; NULL: of an event that was never recorded
} Work;

struct Stream {
  Work *first, *last;
  uint64_t num_queued, num_done;
  pthread_cond_t has_work;
  bool has_thread, is_destroyed;
  int device;
  unsigned seed;     // of its delays
  Graph* capture;    // that takes what is queued, or NULL
  Stream* next;      // of all streams
};

struct Graph {
  Work *first, *last;
  pthread_t owner;
  enum cudaStreamCaptureMode mode;
  bool is_active, is_invalid;
  unsigned num_users;  // the graph and what was made of it
  uint64_t id;
  Graph* next;       // of all active ones
};

// What tests ask for; see standin_count.
typedef enum { OUT, IN, CROSSING, UNPINNED, UNSAFE, REGISTERED, NUM_COUNTERS } Counter;
void standin_add(Counter counter);  // with the lock held
long standin_count(Counter counter);

// device.c
cudaError_t standin_begin(void);            // every call that does something begins with it
cudaError_t standin_result(cudaError_t error);  // remembers it for cudaGetLastError
void standin_set_last_error(cudaError_t error);
int standin_num_devices(void);
int standin_device(void);                   // current, of the runtime and of the driver
cudaError_t standin_push_device(int device);
int standin_pop_device(void);               // -1: nothing was pushed

// streams.c
Stream* standin_stream(void* handle);
Stream* standin_new_stream(void);
Work* standin_work(Kind kind);
cudaError_t standin_put(Stream* stream, Work* work);  // takes the work
void standin_start(Stream* stream, Work* work);       // with the lock held, past any capture
void standin_drain(Stream* stream);
void standin_drain_all(void);
void standin_end_joined(const Graph* graph);  // with the lock held: no stream captures into it any more

// memory.c
typedef enum { PAGEABLE = 0, PINNED = 1, DEVICE = 2 } Place;  // as cudaMemoryType has it
Place standin_place(const void* address);
bool standin_crosses(const void* address, size_t nbytes);  // from one pinned or device range into another or none
void standin_add_range(void* address, size_t nbytes, Place place);
size_t standin_remove_range(void* address);  // its length; 0: there is none
void* standin_map(size_t nbytes);

// copies.c
cudaError_t standin_copy(void* to, const void* from, size_t nbytes, void* stream);

// capture.c
cudaError_t standin_unsafe(const char* call);  // for calls that a capture forbids
cudaError_t standin_capture(Stream* stream, Work* work);  // with the lock held: into the stream's graph
void standin_invalidate(Graph* graph);         // with the lock held

// kernels.c
int standin_enqueue(void* stream, void (*call)(void*), void* data);
