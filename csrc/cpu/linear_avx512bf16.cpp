#include "cpu/linear.h"

const sgf::LinearKernel sgf::kLinearAvx512Bf16 = sgf::kLinear;
