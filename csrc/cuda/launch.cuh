// What every CUDA launcher needs: checks, and a launch that may begin under the end of the kernel before it.
#pragma once

#include <cuda_runtime.h>

#include <initializer_list>

#include "slicegpt_fast.h"

namespace sgf {

// Status of a launch whose pointers must be on the current device, aligned to `alignment` bytes. Null counts as absent.
inline int check_pointers(std::initializer_list<const void*> pointers, uintptr_t alignment) {
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  for (const void* pointer : pointers) {
    if (pointer == nullptr) continue;
    if (reinterpret_cast<uintptr_t>(pointer) % alignment != 0) return SGF_CUDA_MISALIGNED;
    cudaPointerAttributes attributes;
    if (const cudaError_t error = cudaPointerGetAttributes(&attributes, pointer)) return error;
    const bool on_device = attributes.type == cudaMemoryTypeDevice && attributes.device == device;
    if (!on_device && attributes.type != cudaMemoryTypeManaged) return SGF_CUDA_OTHER_DEVICE;
  }
  return SGF_OK;
}

// Launches with programmatic dependent launch where the code that will run knows how to wait for the kernel before it:
// code made for compute capability 9.0 and later, which is when wait_for_previous() becomes an instruction.
template <class... Parameters>
int launch(void (*kernel)(Parameters...), dim3 grid, int threads, void* stream, const Parameters&... parameters) {
  cudaFuncAttributes attributes;
  if (const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel)) return error;
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &early;
  config.numAttrs = attributes.ptxVersion >= 90 ? 1 : 0;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, parameters...);
  const cudaError_t last = cudaGetLastError();  // also clears it: the caller gets the error once
  return error != cudaSuccess ? error : last;
}

// Lets the next kernel's blocks start as soon as this one's stop needing the SMs.
__device__ __forceinline__ void let_next_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Returns once the kernel before this one has ended and its stores are visible. Until then a kernel may only prefetch.
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Counts this block in; true in all threads of the last of `blocks`, which then sees what the others stored, if it
// reads past L1. The counter is zero again afterwards. Sums stay deterministic: they are added by one block, in order.
__device__ __forceinline__ bool arrives_last(int32_t* counter, int32_t blocks) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    last = atomicAdd(counter, 1) == blocks - 1;
    if (last) *counter = 0;
  }
  __syncthreads();
  __threadfence();
  return last;
}

}  // namespace sgf
