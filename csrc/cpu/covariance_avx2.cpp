#include "cpu/covariance.h"

namespace sgf {

void covariance_avx2(const Covariance& call) { run(call); }

}  // namespace sgf
