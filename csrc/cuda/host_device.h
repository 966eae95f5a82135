// For functions that device and host share.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define SGF_INLINE __host__ __device__ __forceinline__
#else
#define SGF_INLINE inline
#endif

namespace sgf {

SGF_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace sgf
