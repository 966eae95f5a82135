#include "cpu/covariance.h"

namespace sgf {

void covariance_avx512bf16(const Covariance& call) { run(call); }

}  // namespace sgf
