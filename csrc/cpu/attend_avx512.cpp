#include "cpu/attend.h"

const sgf::AttendKernel sgf::kAttendAvx512 = sgf::kAttend;
