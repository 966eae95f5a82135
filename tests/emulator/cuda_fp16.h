// 16-bit numbers as csrc/cuda uses them.
#pragma once

#include "cuda_runtime.h"

struct __half {
  uint16_t bits;
  __half() = default;
  explicit __half(float x) : bits(emulator::float_to_half(x)) {}
};
struct __half2 {
  __half x, y;
};
inline float __half2float(__half x) { return emulator::half_to_float(x.bits); }
inline __half __float2half_rn(float x) { return __half(x); }
inline __half2 __floats2half2_rn(float x, float y) { return {__half(x), __half(y)}; }
inline uint16_t __half_as_ushort(__half x) { return x.bits; }
inline __half __ushort_as_half(uint16_t bits) { return std::bit_cast<__half>(bits); }
