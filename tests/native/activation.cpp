// Holds the kernels' activations to their definitions in double precision, on the CPU.
#include "cuda/activation.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <initializer_list>

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
  if (!(std::abs(value - expected) <= 4e-7 * (1 + std::abs(x)))) {
    std::printf("activation %d of %g is %g, not %g\n", activation, x, value, expected);
    std::exit(1);
  }
}

}  // namespace

int main() {
  for (int activation = SGF_NO_ACTIVATION; activation <= SGF_SILU_GATE; ++activation) {
    for (int i = -20000; i <= 20000; ++i) check(static_cast<float>(i) / 1000, activation);
    for (float x : {-3e38f, -1e5f, -100.0f, 0.0f, 1e-30f, 100.0f, 1e5f, 3e38f}) check(x, activation);
    if (!std::isnan(sgf::activate(NAN, activation))) {
      std::printf("activation %d loses a NaN\n", activation);
      return 1;
    }
  }
  return 0;
}
