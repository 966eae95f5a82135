// SGF_REVISION and SGF_CUDA_ARCHS are defined for this file alone (setup.py), so that a new commit recompiles only it.
#include "slicegpt_fast.h"

const char* sgf_revision(void) { return SGF_REVISION; }

const char* sgf_cuda_archs(void) { return SGF_CUDA_ARCHS; }

#ifdef __clang__
const char* sgf_compiler(void) { return __VERSION__; }  // "Clang 17.0.6 ..."
#else
const char* sgf_compiler(void) { return "GCC " __VERSION__; }
#endif

#ifndef SGF_CUDA
const char* sgf_cuda_compiler(void) { return ""; }  // csrc/cuda/probe.cu answers where CUDA is compiled
#endif
