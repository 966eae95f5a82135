// The activations of norm_linear on vectors of fp32.
#pragma once

#include <limits>

#include "cpu/simd.h"
#include "slicegpt_fast.h"

namespace sgf {
namespace {

// exp(x) to about 1 ulp, no less than e^-87, and infinite beyond e^88.
inline Floats exp(Floats x) {
  const Floats limit = x > 88.0f ? splat(std::numeric_limits<float>::infinity()) : Floats{};
  x = x > 88.0f ? splat(88.0f) : x;
  x = x < -87.0f ? splat(-87.0f) : x;
  const Floats shifted = x * 1.44269504f + 0x1.8p23f;  // the nearest whole number, in the low bits
  const Floats whole = shifted - 0x1.8p23f;
  const Floats r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;  // |r| <= log(2) / 2
  Floats p = splat(1.0f / 5040);
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return bit_cast<Floats>(bit_cast<Words>(p) + (bit_cast<Words>(shifted) << 23)) + limit;
}

inline Floats silu(Floats x) { return x / (1.0f + exp(-x)); }

// Abramowitz and Stegun 7.1.26: off by 1.5e-7 at most.
inline Floats erf(Floats x) {
  const Floats magnitude = x < 0.0f ? -x : x;
  const Floats t = 1.0f / (1.0f + 0.3275911f * magnitude);
  Floats p = splat(1.061405429f);
  p = p * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  const Floats result = 1.0f - p * t * exp(-x * x);
  return x < 0.0f ? -result : result;
}

inline Floats activate(int activation, Floats x) {
  switch (activation) {
    case SGF_RELU:
      return x < 0.0f ? Floats{} : x;
    case SGF_GELU:
      return 0.5f * x * (1.0f + erf(x * 0.707106781f));
    case SGF_GELU_TANH:  // 1 + tanh(u) = 2 / (1 + exp(-2u))
      return x / (1.0f + exp(x * (-1.59576912f - 0.0713548163f * x * x)));
    default:
      return x;
  }
}

}  // namespace
}  // namespace sgf
