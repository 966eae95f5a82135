// The index arithmetic that the Hopper kernels share: descriptors and accumulators.
#include "cuda/hopper.h"

#include "expect.h"

using namespace sgf::hopper;

namespace {

void descriptors() {
  for (uint32_t address : {0u, 1024u, 32u, 199u << 10, (227u << 10) - 16}) {
    for (int block : {0, 8192}) {
      const uint64_t x = descriptor(address, block);
      expect((x & 0x3fff) << 4 == address, "a descriptor keeps its address", address, x & 0x3fff);
      expect((x >> 16 & 0x3fff) << 4 == static_cast<uint64_t>(block), "a descriptor keeps its block", block, x >> 16);
      expect((x >> 32 & 0x3fff) << 4 == kEightRows, "eight rows are 1024 bytes apart", x >> 32);
      expect(x >> 62 == 1, "the swizzle has rows of 128 bytes", x >> 62);
      expect((x & 0x3fffc000c000c000) == 0, "nothing else is set", x >> 32, x & 0xffffffff);
    }
  }
}

void accumulators() {
  for (int columns : {128, 160, 192, 208, 224, 240, 256}) {
    Cells tile("each cell of a warpgroup's tile has one accumulator", 64 * columns);
    for (int thread = 0; thread < 128; ++thread) {
      for (int c = 0; c < columns / 2; ++c) {
        const int row = accumulator_row(thread, c), column = accumulator_column(thread, c);
        tile.take(row * columns + column);
        expect(row / 16 == thread / 32, "a warp has 16 rows", thread, row);
        expect(c % 2 == 0 || (row == accumulator_row(thread, c - 1) && column == accumulator_column(thread, c - 1) + 1),
               "accumulators are pairs of columns", thread, c);
      }
    }
    tile.expect_all();
  }
}

}  // namespace

int main() {
  descriptors();
  accumulators();
  return 0;
}
