// The emulated kernels as a Python module, and the part of the CUDA driver that they ask for. Every architecture's
// module has a name of its own, EMULATED: of two with one name Python would hand out the first one twice.
#include <cuda.h>

#include "bindings.h"

PYBIND11_MODULE(EMULATED, m) { sgf::bind_cuda(m); }

CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType, cuuint32_t rank, void* base,
                                const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                                const cuuint32_t* element_strides, CUtensorMapInterleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  bool fits = rank == 3 && swizzle == CU_TENSOR_MAP_SWIZZLE_128B && reinterpret_cast<uintptr_t>(base) % 16 == 0 &&
              box[0] * 2 <= 128;
  for (int i = 0; i < 3; ++i) {
    fits = fits && sizes[i] >= 1 && sizes[i] <= uint64_t{1} << 32 && box[i] >= 1 && box[i] <= 256 &&
           element_strides[i] == 1;
  }
  for (int i = 0; i < 2; ++i) fits = fits && strides[i] % 16 == 0 && strides[i] < uint64_t{1} << 40;
  if (!fits) return CUDA_ERROR_INVALID_VALUE;
  *map = {static_cast<const uint8_t*>(base),
          {sizes[0], sizes[1], sizes[2]},
          {strides[0], strides[1]},
          {box[0], box[1], box[2]}};
  return CUDA_SUCCESS;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** entry, unsigned, int,
                                             cudaDriverEntryPointQueryResult* found) {
  if (std::string(name) != "cuTensorMapEncodeTiled") return cudaErrorNotSupported;
  *entry = reinterpret_cast<void*>(&cuTensorMapEncodeTiled);
  *found = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
