#include "cpu/linear.h"

const sgf::LinearKernel sgf::kLinearAvx2 = sgf::kLinear;
