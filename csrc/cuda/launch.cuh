// What every CUDA launcher needs: checks, and a launch that may begin under the end of the kernel before it.
#pragma once

#include <cuda_runtime.h>

#include <initializer_list>

#include "cuda/instructions.cuh"
#include "slicegpt_fast.h"

namespace sgf {

// Status of a launch whose operands must be on the current device, aligned to `alignment` bytes, or absent.
inline int check_operands(std::initializer_list<sgf_matrix> operands, uintptr_t alignment) {
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  for (const sgf_matrix& operand : operands) {
    if (operand.data == nullptr) continue;
    if (reinterpret_cast<uintptr_t>(operand.data) % alignment != 0) return SGF_CUDA_MISALIGNED;
    cudaPointerAttributes attributes;
    if (const cudaError_t error = cudaPointerGetAttributes(&attributes, operand.data)) return error;
    const bool on_device = attributes.type == cudaMemoryTypeDevice && attributes.device == device;
    if (!on_device && attributes.type != cudaMemoryTypeManaged) return SGF_CUDA_OTHER_DEVICE;
  }
  return SGF_OK;
}

inline sgf_matrix transposed(const sgf_matrix& matrix) {
  return {matrix.data, matrix.columns, matrix.rows, matrix.column_stride, matrix.row_stride};
}

// Whether rows are contiguous: of a matrix without this, columns are.
inline bool has_rows(const sgf_matrix& matrix) { return matrix.column_stride == 1 || matrix.columns == 1; }

struct Launch {
  dim3 grid, threads;
  int shared_bytes = 0;  // beyond what the kernel declares
  dim3 cluster = 1;
};

// Launches in clusters, and with programmatic dependent launch, where the code that will run was made for it: for
// compute capability 9.0 and later, which is when wait_for_previous() becomes an instruction; every kernel calls it.
// The GPU does not decide: it may be running code for 8.0, which must not count on either.
template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), const Launch& how, uintptr_t stream, const Arguments&... arguments) {
  cudaFuncAttributes attributes;
  if (const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel)) return error;
  if (const cudaError_t error =
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, how.shared_bytes)) {
    return error;
  }
  cudaLaunchAttribute hopper[2]{};
  hopper[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  hopper[0].val.programmaticStreamSerializationAllowed = 1;
  hopper[1].id = cudaLaunchAttributeClusterDimension;
  hopper[1].val.clusterDim.x = how.cluster.x;
  hopper[1].val.clusterDim.y = how.cluster.y;
  hopper[1].val.clusterDim.z = how.cluster.z;
  cudaLaunchConfig_t config{};
  config.gridDim = how.grid;
  config.blockDim = how.threads;
  config.dynamicSmemBytes = static_cast<size_t>(how.shared_bytes);
  config.stream = reinterpret_cast<cudaStream_t>(stream);
  config.attrs = hopper;
  config.numAttrs = attributes.ptxVersion >= 90 ? 2 : 0;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
  const cudaError_t last = cudaGetLastError();  // also clears it: the caller gets the error once
  return error != cudaSuccess ? error : last;
}

// Counts this block in; true in all threads of the last of `blocks`, which then sees what the others stored, if it
// reads past L1. The counter is zero again afterwards. Sums stay deterministic: they are added by one block, in order.
// One thread's release and acquire stand for its block: the barriers on both sides pass on what they order.
__device__ __forceinline__ bool arrives_last(int32_t* counter, int32_t blocks) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) {
    last = count_in(counter) == blocks - 1;
    if (last) *counter = 0;
  }
  __syncthreads();
  return last;
}

}  // namespace sgf
