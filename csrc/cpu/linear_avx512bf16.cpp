#include "cpu/linear.h"

void sgf::linear_avx512bf16(const Linear& call) { run_linear(call); }
