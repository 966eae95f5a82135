#include "cpu/linear.h"

void sgf::linear_avx512(const Linear& call) { run_linear(call); }
