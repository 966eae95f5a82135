// Answers two questions about this build: which compiler made the device code, and which of its architectures a GPU
// runs.
#include "cuda/launch.cuh"

#define SGF_STRING_(x) #x
#define SGF_STRING(x) SGF_STRING_(x)

namespace {

__global__ void probe(int32_t* out) {
  sgf::wait_for_previous();
#ifdef __CUDA_ARCH__
  if (threadIdx.x == 0) {
    out[0] = static_cast<int32_t>(blockDim.x);
    out[1] = __CUDA_ARCH__;
  }
#endif
}

}  // namespace

const char* sgf_cuda_compiler(void) {
  return "nvcc " SGF_STRING(__CUDACC_VER_MAJOR__) "." SGF_STRING(__CUDACC_VER_MINOR__) "." SGF_STRING(
      __CUDACC_VER_BUILD__);
}

const char* sgf_cuda_status_text(int status) { return cudaGetErrorString(static_cast<cudaError_t>(status)); }

int sgf_cuda_probe(sgf_matrix out, int threads, uintptr_t stream) {
  return sgf::launch(probe, {1, static_cast<unsigned>(threads)}, stream, static_cast<int32_t*>(out.data));
}
