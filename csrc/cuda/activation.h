// The activations of norm_linear, for device and host. On the device exp and division are the fast ones: a few units in
// the last place of fp32, where the result is rounded to 16 bits.
#pragma once

#include <cmath>

#include "arithmetic.h"
#include "slicegpt_fast.h"

#ifdef __CUDA_ARCH__
#include "cuda/instructions.cuh"
#endif

namespace sgf {

SGF_INLINE float exp2_of(float x) {
#ifdef __CUDA_ARCH__
  return fast_exp2(x);
#else
  return std::exp2(x);
#endif
}

SGF_INLINE float reciprocal_of(float x) {
#ifdef __CUDA_ARCH__
  return fast_reciprocal(x);
#else
  return 1 / x;
#endif
}

constexpr float kLog2E = 1.4426950f;

SGF_INLINE float sigmoid(float x) { return reciprocal_of(1 + exp2_of(-kLog2E * x)); }

// The normal distribution beyond x >= 0, erfc(x / sqrt(2)) / 2, to 1e-7: Abramowitz and Stegun, 7.1.26. A third of
// erff's instructions, of which a tile has one per element.
SGF_INLINE float beyond(float x) {
  const float t = reciprocal_of(1 + 0.23164189f * x);
  float polynomial = 0.5307027145f * t - 0.7265760135f;
  polynomial = polynomial * t + 0.7107068705f;
  polynomial = polynomial * t - 0.142248368f;
  polynomial = polynomial * t + 0.127414796f;
  return polynomial * t * exp2_of(-0.5f * kLog2E * x * x);
}

SGF_INLINE float activate(float x, int activation) {
  switch (activation) {
    case SGF_RELU:
      return x < 0 ? 0 : x;  // not fmaxf, which would lose a NaN
    case SGF_GELU: {
      const float tail = beyond(std::abs(x));
      return x * (x < 0 ? tail : 1 - tail);
    }
    case SGF_GELU_TANH:  // 0.5 (1 + tanh u) is the sigmoid of 2 u
      return x * reciprocal_of(1 + exp2_of(-kLog2E * 1.5957691f * x * (1 + 0.044715f * x * x)));
    case SGF_SILU_GATE:
      return x * sigmoid(x);
  }
  return x;
}

}  // namespace sgf
