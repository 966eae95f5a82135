#include "slicegpt_fast.h"

const char* sgf_status_text(int status) {
  switch (status) {
    case SGF_OK:
      return "success";
    case SGF_UNKNOWN_CPU_ISA:
      return "SLICEGPT_FAST_CPU_ISA names no instruction set of this machine";
    case SGF_OUT_OF_MEMORY:
      return "there is no memory left for what the kernel keeps";
    case SGF_CUDA_BAD_ARGUMENT:
      return "a CUDA launcher does not take these sizes, this dtype or a null pointer";
    case SGF_CUDA_MISALIGNED:
      return "a pointer is not aligned for its type";
    case SGF_CUDA_OTHER_DEVICE:
      return "a pointer does not lie on the current CUDA device";
    case SGF_CUDA_WORKSPACE:
      return "the workspace or the counters are missing or too small for this launch";
  }
#ifdef SGF_CUDA
  if (status > 0) return sgf_cuda_status_text(status);
#endif
  return "unknown status";
}
