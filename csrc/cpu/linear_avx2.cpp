#include "cpu/linear.h"

void sgf::linear_avx2(const Linear& call) { run_linear(call); }
