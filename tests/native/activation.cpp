// The kernels' activations, against their definitions in double precision.
#include "cuda/activation.h"

#include <cmath>
#include <initializer_list>

#include "expect.h"

namespace {

double exact(double x, int activation) {
  switch (activation) {
    case SGF_RELU:
      return x < 0 ? 0 : x;
    case SGF_GELU:
      return x * std::erfc(-x / std::sqrt(2.0)) / 2;
    case SGF_GELU_TANH:
      return x * (1 + std::tanh(std::sqrt(2 / std::acos(-1.0)) * (x + 0.044715 * x * x * x))) / 2;
    case SGF_SILU_GATE:
      return x / (1 + std::exp(-x));
  }
  return x;
}

void check(float x, int activation) {
  const double value = sgf::activate(x, activation), expected = exact(x, activation);
  const bool close = std::abs(value - expected) <= 4e-7 * (1 + std::abs(x));
  expect(close, "an activation is what its definition says", activation, x);
}

}  // namespace

int main() {
  for (int activation = SGF_NO_ACTIVATION; activation <= SGF_SILU_GATE; ++activation) {
    for (int i = -20000; i <= 20000; ++i) check(static_cast<float>(i) / 1000, activation);
    for (float x : {-3e38f, -1e5f, -100.0f, 0.0f, 1e-30f, 100.0f, 1e5f, 3e38f}) check(x, activation);
    expect(std::isnan(sgf::activate(NAN, activation)), "an activation keeps a NaN", activation);
  }
  return 0;
}
