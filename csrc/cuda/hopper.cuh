// What the Hopper kernels' launchers tell the copy engine.
#pragma once

#include <cuda.h>

#include "cuda/hopper.h"
#include "cuda/launch.cuh"

namespace sgf::hopper {

// Tensor map of a 16-bit tensor [sizes[2]][sizes[1]][sizes[0]] for boxes of [1][box_rows][64], which land with the
// 128-byte swizzle; what lies outside the tensor arrives as zeros. Strides count elements.
inline int make_map(const void* tensor, int64_t const (&sizes)[3], int64_t const (&strides)[2], int box_rows, int dtype,
                    CUtensorMap* map) {
  static void* entry = nullptr;
  static cudaDriverEntryPointQueryResult found;
  static const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found);
  if (error != cudaSuccess) return error;
  if (found != cudaDriverEntryPointSuccess) return cudaErrorNotSupported;
  const cuuint64_t counts[3] = {static_cast<cuuint64_t>(sizes[0]), static_cast<cuuint64_t>(sizes[1]),
                                static_cast<cuuint64_t>(sizes[2])};
  const cuuint64_t bytes[2] = {static_cast<cuuint64_t>(strides[0]) * 2, static_cast<cuuint64_t>(strides[1]) * 2};
  const cuuint32_t box[3] = {kRowBytes / 2, static_cast<cuuint32_t>(box_rows), 1}, every[3] = {1, 1, 1};
  const CUresult result = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(entry)(
      map, dtype == SGF_BFLOAT16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 3,
      const_cast<void*>(tensor), counts, bytes, box, every, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? SGF_OK : SGF_CUDA_BAD_ARGUMENT;
}

// Launches a kernel of a file that is compiled for 9.0 alone: its clusters do not hang on what the driver says of it.
template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), Launch how, uintptr_t stream, const Arguments&... arguments) {
  how.hopper_only = true;
  return sgf::launch(kernel, how, stream, arguments...);
}

}  // namespace sgf::hopper
