// Integer arithmetic, for device and host. Always inlined, for csrc/cpu/ compiles it for several instruction sets,
// which must not share a function.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define SGF_INLINE __host__ __device__ __forceinline__
#else
#define SGF_INLINE inline __attribute__((always_inline))
#endif

namespace sgf {

// a / b, rounded up, where a + b does not overflow.
template <class A, class B>
SGF_INLINE constexpr auto ceil_div(A a, B b) -> decltype(a / b) {
  return (a + b - 1) / b;
}

// The number from 0 to `most` that is nearest to x.
template <class Integer>
SGF_INLINE constexpr int clamp(Integer x, int most) {
  return x < 0 ? 0 : x > most ? most : static_cast<int>(x);
}

}  // namespace sgf
