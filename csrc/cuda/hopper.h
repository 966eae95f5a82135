// What the Hopper kernels share of index arithmetic, for device and host: how the tensor cores find an operand in
// shared memory, and where an accumulator lies in the tile.
//
// The copy engine writes boxes of 128-byte rows with the 128-byte swizzle: the 16-byte unit u of row r stands at unit u
// ^ (r % 8). Eight rows, 1024 bytes, are what the tensor cores call a core matrix, and where addresses must be aligned.
//
//     along K       row = a row of A or B, 64 k long       16 k are 32 bytes further in every row
//     along M or N  row = one k, 64 rows of A or B long    16 k are 16 rows further; the next 64 of M or N are a block
#pragma once

#include <cstdint>

#include "arithmetic.h"

namespace sgf::hopper {

constexpr int kRanks = 2;  // blocks of a cluster
constexpr int kRowBytes = 128;
constexpr int kEightRows = 8 * kRowBytes;
constexpr int kSixteenRows = 2 * kEightRows;

// Matrix descriptor, 128-byte swizzle, of the 16 k from `address` on: eight rows are 1024 bytes apart from the next
// eight. `block` is how far apart 64 of M or N are from the next 64; an operand along K has no use for it.
SGF_INLINE uint64_t descriptor(uint32_t address, int block) {
  return static_cast<uint64_t>((address & 0x3ffff) >> 4) | static_cast<uint64_t>(block >> 4) << 16 |
         static_cast<uint64_t>(kEightRows >> 4) << 32 | static_cast<uint64_t>(1) << 62;
}

// Row and column of accumulator c of a warpgroup's thread, in its 64 rows.
SGF_INLINE int accumulator_row(int thread, int c) { return thread / 32 * 16 + thread % 32 / 4 + c / 2 % 2 * 8; }

SGF_INLINE int accumulator_column(int thread, int c) { return c / 4 * 8 + thread % 4 * 2 + c % 2; }

}  // namespace sgf::hopper
