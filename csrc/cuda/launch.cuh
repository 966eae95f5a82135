// What every CUDA launcher needs: checks, and a launch that may begin under the end of the kernel before it.
#pragma once

#include <cuda_runtime.h>

#include <initializer_list>
#include <map>
#include <utility>

#include "cuda/instructions.cuh"
#include "cuda/overlap.h"
#include "slicegpt_fast.h"

namespace sgf {

// Status of a launch whose operands must be aligned to `alignment` bytes, or absent, and on the current device. The
// driver is asked for that only where assertions are compiled in: it takes as long as the launch.
inline int check_operands(std::initializer_list<sgf_matrix> operands, uintptr_t alignment) {
  for (const sgf_matrix& operand : operands) {
    if (operand.data == nullptr) continue;
    if (reinterpret_cast<uintptr_t>(operand.data) % alignment != 0) return SGF_CUDA_MISALIGNED;
#ifndef NDEBUG
    int device = 0;
    cudaPointerAttributes attributes;
    if (const cudaError_t error = cudaGetDevice(&device)) return error;
    if (const cudaError_t error = cudaPointerGetAttributes(&attributes, operand.data)) return error;
    const bool on_device = attributes.type == cudaMemoryTypeDevice && attributes.device == device;
    if (!on_device && attributes.type != cudaMemoryTypeManaged) return SGF_CUDA_OTHER_DEVICE;
#endif
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
  bool hopper_only = false;  // compiled for 9.0 alone
};

// A kernel on a device, as the launches so far have made it ready.
struct Ready {
  bool hopper;       // its code is for compute capability 9.0 or later
  int shared_bytes;  // that it may use
};

// Asks the driver once per kernel, device and thread. The GPU does not decide whether its code is Hopper's: it may run
// code for 8.0.
template <class Kernel>
int make_ready(Kernel* kernel, const Launch& how, bool* hopper) {
  static thread_local std::map<std::pair<Kernel*, int>, Ready> known;
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  auto found = known.find({kernel, device});
  if (found == known.end()) {
    cudaFuncAttributes attributes;
    if (const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel)) return error;
    found = known.insert({{kernel, device}, {how.hopper_only || attributes.ptxVersion >= 90, 0}}).first;
  }
  if (how.shared_bytes > found->second.shared_bytes) {
    if (const cudaError_t error =
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, how.shared_bytes)) {
      return error;
    }
    found->second.shared_bytes = how.shared_bytes;
  }
  *hopper = found->second.hopper;
  return SGF_OK;
}

// Launches in clusters, and with programmatic dependent launch, where the code that will run was made for it: for
// compute capability 9.0 and later, which is when wait_for_previous() becomes an instruction; every kernel calls it.
template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), const Launch& how, uintptr_t stream, const Arguments&... arguments) {
  bool hopper = false;
  if (const int status = make_ready(kernel, how, &hopper)) return status;
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim.x = how.cluster.x;
  attributes[0].val.clusterDim.y = how.cluster.y;
  attributes[0].val.clusterDim.z = how.cluster.z;
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = how.grid;
  config.blockDim = how.threads;
  config.dynamicSmemBytes = static_cast<size_t>(how.shared_bytes);
  config.stream = reinterpret_cast<cudaStream_t>(stream);
  config.attrs = attributes;
  config.numAttrs = !hopper ? 0 : overlaps() ? 2 : 1;
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
