// The switch for kernels that begin under the end of the one before.
#include "cuda/overlap.h"

#include "expect.h"

int main() {
  expect(sgf::overlap_allowed(nullptr), "kernels overlap by default", 0);
  expect(sgf::overlap_allowed("1") && sgf::overlap_allowed("") && sgf::overlap_allowed("00"), "0 alone is no", 0);
  expect(!sgf::overlap_allowed("0"), "0 switches it off", 0);
  setenv("SLICEGPT_FAST_PDL", "0", 1);
  expect(!sgf::overlaps(), "the environment says so", 0);
  setenv("SLICEGPT_FAST_PDL", "1", 1);
  expect(!sgf::overlaps(), "it is read once", 0);
  return 0;
}
