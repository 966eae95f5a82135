#include "cpu/attend.h"

const sgf::AttendKernel sgf::kAttendAvx2 = sgf::kAttend;
