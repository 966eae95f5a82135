// What the programs in this folder share. Each is the unit test of one header of csrc/cuda: it ends with 1, and says
// what does not hold, where something does not.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

inline void expect(bool holds, const char* what, double a, double b = 0) {
  if (holds) return;
  std::printf("does not hold: %s (%.10g, %.10g)\n", what, a, b);
  std::exit(1);
}

// Cells 0 .. count - 1, of which each is to be taken once.
class Cells {
 public:
  Cells(const char* what, int64_t count) : what(what), times(count) {}

  void take(int64_t cell) {
    expect(cell >= 0 && cell < static_cast<int64_t>(times.size()), what, cell, times.size());
    expect(++times[cell] == 1, what, cell, times[cell]);
  }
  void expect_all() const {
    for (size_t cell = 0; cell < times.size(); ++cell) expect(times[cell] == 1, what, cell, times[cell]);
  }

 private:
  const char* what;
  std::vector<int> times;
};
