// The 16-bit elements of matrices: their bits, alone and in pairs, the first one low, to fp32 and back.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace sgf {

struct Half {
  static constexpr bool kBfloat16 = false;
  static __device__ float widen(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
  static __device__ uint16_t round(float x) { return __half_as_ushort(__float2half_rn(x)); }
  static __device__ float low(uint32_t pair) { return widen(pair & 0xffff); }
  static __device__ float high(uint32_t pair) { return widen(pair >> 16); }
  static __device__ uint32_t pack(float low, float high) {
    const __half2 pair = __floats2half2_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  }
};

struct Bfloat16 {
  static constexpr bool kBfloat16 = true;
  static __device__ float widen(uint16_t bits) { return __bfloat162float(__ushort_as_bfloat16(bits)); }
  static __device__ uint16_t round(float x) { return __bfloat16_as_ushort(__float2bfloat16_rn(x)); }
  static __device__ float low(uint32_t pair) { return __uint_as_float(pair << 16); }
  static __device__ float high(uint32_t pair) { return __uint_as_float(pair & 0xffff0000); }
  static __device__ uint32_t pack(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  }
};

}  // namespace sgf
