#include "slicegpt_fast.h"

const char* sgf_status_text(int status) {
  switch (status) {
    case SGF_OK:
      return "success";
    case SGF_UNKNOWN_CPU_ISA:
      return "SLICEGPT_FAST_CPU_ISA names no instruction set of this machine";
  }
#ifdef SGF_CUDA
  if (status > 0) return sgf_cuda_status_text(status);
#endif
  return "unknown status";
}
