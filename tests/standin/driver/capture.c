// Capture: what is queued on a capturing stream goes into a graph; what others may not do meanwhile; replay.
#include <stdio.h>
#include <stdlib.h>

#include "standin.h"

static Graph* active;  // all captures under way
static uint64_t num_captures;
static __thread enum cudaStreamCaptureMode mode_of_thread = cudaStreamCaptureModeGlobal;

// -- rules ----------------------------------------------------------------------------------------

void standin_invalidate(Graph* graph) {
  graph->is_invalid = true;
  standin_add(UNSAFE);
}

// A capture forbids its own thread what could depend on unfinished work, unless it is relaxed; a global one forbids
// it every thread whose own mode is global.
static bool forbids(const Graph* graph) {
  if (graph->mode == cudaStreamCaptureModeRelaxed) return false;
  if (pthread_equal(graph->owner, pthread_self())) return true;
  return graph->mode == cudaStreamCaptureModeGlobal && mode_of_thread == cudaStreamCaptureModeGlobal;
}

cudaError_t standin_unsafe(const char* call) {
  cudaError_t error = cudaSuccess;
  if (mode_of_thread == cudaStreamCaptureModeRelaxed) return error;
  pthread_mutex_lock(&standin_lock);
  for (Graph* graph = active; graph != NULL; graph = graph->next) {
    if (!forbids(graph)) continue;
    standin_invalidate(graph);
    error = cudaErrorStreamCaptureUnsupported;
    if (getenv("STANDIN_VERBOSE")) fprintf(stderr, "stand-in: %s invalidates a capture\n", call);
  }
  pthread_mutex_unlock(&standin_lock);
  return error;
}

cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode* mode) {
  enum cudaStreamCaptureMode before = mode_of_thread;
  mode_of_thread = *mode;
  *mode = before;
  return cudaSuccess;
}

// -- captures -------------------------------------------------------------------------------------

cudaError_t standin_capture(Stream* stream, Work* work) {
  Graph* graph = stream->capture;
  if (graph->is_invalid) {
    free(work);
    return cudaErrorStreamCaptureInvalidated;
  }
  work->next = NULL;
  if (graph->last != NULL) {
    graph->last->next = work;
  } else {
    graph->first = work;
  }
  graph->last = work;
  return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t handle, enum cudaStreamCaptureMode mode) {
  Stream* stream = standin_stream(handle);
  if ((size_t)handle <= 2) return standin_result(cudaErrorStreamCaptureUnsupported);
  Graph* graph = calloc(1, sizeof(Graph));
  graph->mode = mode;
  graph->owner = pthread_self();
  graph->is_active = true;
  graph->num_users = 1;
  pthread_mutex_lock(&standin_lock);
  graph->id = ++num_captures;
  graph->next = active;
  active = graph;
  stream->capture = graph;
  pthread_mutex_unlock(&standin_lock);
  return cudaSuccess;
}

static void remove_active(Graph* graph) {
  Graph** link = &active;
  while (*link != graph) link = &(*link)->next;
  *link = graph->next;
  graph->is_active = false;
}

cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t* result) {
  Stream* stream = standin_stream(handle);
  *result = NULL;
  pthread_mutex_lock(&standin_lock);
  Graph* graph = stream->capture;
  if (graph != NULL) {
    remove_active(graph);
    standin_end_joined(graph);
  }
  pthread_mutex_unlock(&standin_lock);
  if (graph == NULL) return standin_result(cudaErrorIllegalState);
  if (graph->is_invalid) return standin_result(cudaErrorStreamCaptureInvalidated);
  *result = (cudaGraph_t)graph;
  return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t handle, enum cudaStreamCaptureStatus* status) {
  Stream* stream = standin_stream(handle);
  pthread_mutex_lock(&standin_lock);
  *status = cudaStreamCaptureStatusNone;
  if (stream->capture != NULL) {
    *status = stream->capture->is_invalid ? cudaStreamCaptureStatusInvalidated : cudaStreamCaptureStatusActive;
  }
  pthread_mutex_unlock(&standin_lock);
  return cudaSuccess;
}

cudaError_t cudaStreamGetCaptureInfo(cudaStream_t handle, enum cudaStreamCaptureStatus* status, unsigned long long* id,
                                     cudaGraph_t* graph, const cudaGraphNode_t** dependencies,
                                     const cudaGraphEdgeData** edges, size_t* num_dependencies) {
  cudaStreamIsCapturing(handle, status);
  Graph* capture = standin_stream(handle)->capture;
  if (id != NULL) *id = capture != NULL ? capture->id : 0;
  if (graph != NULL) *graph = (cudaGraph_t)capture;
  if (dependencies != NULL) *dependencies = NULL;
  if (edges != NULL) *edges = NULL;
  if (num_dependencies != NULL) *num_dependencies = 0;
  return cudaSuccess;
}

// -- graphs: what was captured, in the order it was captured in -------------------------------------

cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* result, cudaGraph_t handle, unsigned long long flags) {
  Graph* graph = (Graph*)handle;
  pthread_mutex_lock(&standin_lock);
  ++graph->num_users;
  pthread_mutex_unlock(&standin_lock);
  *result = (cudaGraphExec_t)graph;
  return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t handle, cudaStream_t on) {
  Stream* stream = standin_stream(on);
  for (Work* captured = ((Graph*)handle)->first; captured != NULL; captured = captured->next) {
    Work* work = standin_work(captured->kind);
    *work = *captured;
    cudaError_t error = standin_put(stream, work);
    if (error != cudaSuccess) return standin_result(error);
  }
  return cudaSuccess;
}

// Events point to the graph they were recorded in: only what it holds is freed.
static cudaError_t leave(Graph* graph) {
  pthread_mutex_lock(&standin_lock);
  bool is_unused = --graph->num_users == 0;
  while (is_unused && graph->first != NULL) {
    Work* work = graph->first;
    graph->first = work->next;
    free(work);
  }
  pthread_mutex_unlock(&standin_lock);
  return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) {
  return leave((Graph*)graph);
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  return leave((Graph*)graph);
}

cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t* nodes, size_t* num_nodes) {
  *num_nodes = ((Graph*)graph)->first != NULL;  // whether there are any is all that PyTorch asks
  return cudaSuccess;
}
