#include "cpu/covariance.h"

namespace sgf {

void covariance_avx512(const Covariance& call) { run(call); }

}  // namespace sgf
