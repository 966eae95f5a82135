#include "cpu/linear.h"

const sgf::LinearKernel sgf::kLinearAvx512 = sgf::kLinear;
