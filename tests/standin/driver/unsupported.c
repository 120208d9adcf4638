// What PyTorch links to or looks up, and the stand-in does not have: every one answers "not supported".
// Their prototypes are not included: none is called with success.

#define UNSUPPORTED(name) \
  int name(void) {        \
    return 801;           \
  }

UNSUPPORTED(cudaIpcCloseMemHandle)
UNSUPPORTED(cudaIpcGetEventHandle)
UNSUPPORTED(cudaIpcGetMemHandle)
UNSUPPORTED(cudaIpcOpenEventHandle)
UNSUPPORTED(cudaIpcOpenMemHandle)

// Memory of several processes and devices, which expandable segments look up
UNSUPPORTED(cuMemExportToShareableHandle)
UNSUPPORTED(cuMemGetAllocationPropertiesFromHandle)
UNSUPPORTED(cuMemImportFromShareableHandle)
UNSUPPORTED(cuMemRetainAllocationHandle)
UNSUPPORTED(cuMemsetD32Async)
UNSUPPORTED(cuMulticastAddDevice)
UNSUPPORTED(cuMulticastBindMem)
UNSUPPORTED(cuMulticastCreate)
UNSUPPORTED(cuMulticastUnbind)
UNSUPPORTED(cuStreamWriteValue32)

// cudaMallocAsync
UNSUPPORTED(cudaDeviceGetDefaultMemPool)
UNSUPPORTED(cudaFreeAsync)
UNSUPPORTED(cudaMallocAsync)
UNSUPPORTED(cudaMemPoolGetAttribute)
UNSUPPORTED(cudaMemPoolSetAccess)
UNSUPPORTED(cudaMemPoolSetAttribute)
UNSUPPORTED(cudaMemPoolTrimTo)

// Kernels and modules
UNSUPPORTED(cudaFuncGetAttributes)
UNSUPPORTED(cudaFuncSetAttribute)
UNSUPPORTED(cudaGetSymbolAddress)
UNSUPPORTED(cudaMemcpyToSymbol)
UNSUPPORTED(cudaOccupancyMaxActiveBlocksPerMultiprocessor)
UNSUPPORTED(cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags)
UNSUPPORTED(cuFuncGetAttribute)
UNSUPPORTED(cuFuncGetAttributes)
UNSUPPORTED(cuFuncSetAttribute)
UNSUPPORTED(cuFuncSetCacheConfig)
UNSUPPORTED(cuLaunchCooperativeKernel)
UNSUPPORTED(cuLaunchKernel)
UNSUPPORTED(cuLaunchKernelEx)
UNSUPPORTED(cuLinkAddData_v2)
UNSUPPORTED(cuLinkComplete)
UNSUPPORTED(cuLinkCreate_v2)
UNSUPPORTED(cuLinkDestroy)
UNSUPPORTED(cuModuleGetFunction)
UNSUPPORTED(cuModuleLoad)
UNSUPPORTED(cuModuleLoadData)
UNSUPPORTED(cuModuleLoadDataEx)
UNSUPPORTED(cuModuleUnload)
UNSUPPORTED(cuOccupancyMaxActiveBlocksPerMultiprocessor)
UNSUPPORTED(cuOccupancyMaxActiveClusters)
UNSUPPORTED(cuPointerGetAttribute)
UNSUPPORTED(cuTensorMapEncodeTiled)

// Graphs beyond replay
UNSUPPORTED(cudaGraphDebugDotPrint)
UNSUPPORTED(cudaGraphNodeGetDependencies)
UNSUPPORTED(cudaStreamAddCallback)
