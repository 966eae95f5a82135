// The activations of norm_linear, for device and host. On the device exp and division are the fast ones: a few units in
// the last place of fp32, where the result is rounded to 16 bits.
#pragma once

#include <cmath>

#include "arithmetic.h"
#include "slicegpt_fast.h"

namespace sgf {

SGF_INLINE float sigmoid(float x) {
#ifdef __CUDA_ARCH__
  return __fdividef(1, 1 + __expf(-x));
#else
  return 1 / (1 + std::exp(-x));
#endif
}

SGF_INLINE float activate(float x, int activation) {
  switch (activation) {
    case SGF_RELU:
      return x < 0 ? 0 : x;  // not fmaxf, which would lose a NaN
    case SGF_GELU:
      return 0.5f * x * (1 + erff(x * 0.70710678f));
    case SGF_GELU_TANH:  // 0.5 (1 + tanh u) is the sigmoid of 2 u
      return x * sigmoid(1.5957691f * (x + 0.044715f * x * x * x));
    case SGF_SILU_GATE:
      return x * sigmoid(x);
  }
  return x;
}

}  // namespace sgf
