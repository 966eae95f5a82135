#include "cpu/attend.h"

const sgf::AttendKernel sgf::kAttendAvx512Bf16 = sgf::kAttend;
