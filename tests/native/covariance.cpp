// Runs the covariance kernel's data flow on the CPU: what the copy engine writes where, what the tensor cores read by
// their descriptors, where accumulators and workspace cells lie, against plain sums. Small integers: equal means equal.
#include "cuda/covariance.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

using namespace sgf::covariance;
using namespace sgf::hopper;

namespace {

[[noreturn]] void fail(const char* what, int64_t a, int64_t b) {
  std::printf("%s: %lld %lld\n", what, static_cast<long long>(a), static_cast<long long>(b));
  std::exit(1);
}

// The 128-byte swizzle: bits 4 to 6 of an address are xored with bits 7 to 9.
uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

using Shared = std::vector<uint8_t>;

// A box of the copy engine: zeros outside of x [N, D].
void copy(const std::vector<uint16_t>& x, int64_t N, int64_t D, int64_t column, int64_t token, Shared& to, int offset) {
  for (int t = 0; t < kBoxTokens; ++t) {
    for (int c = 0; c < kBlock; ++c) {
      const bool inside = token + t < N && column + c < D;
      const uint16_t value = inside ? x[(token + t) * D + column + c] : 0;
      std::memcpy(&to[swizzled(offset + (t * kBlock + c) * 2)], &value, 2);
    }
  }
}

// Element mn of token k as the tensor core finds it by a descriptor with the 128-byte swizzle, operand along M or N.
int64_t read(const Shared& from, uint64_t descriptor, int mn, int k) {
  if (descriptor >> 62 != 1) fail("swizzle mode", descriptor >> 62, 1);
  const auto field = [&](int bit) { return static_cast<uint32_t>(descriptor >> bit & 0x3fff) << 4; };
  const uint32_t start = field(0), leading = field(16), stride = field(32);
  uint16_t value;
  std::memcpy(&value, &from[swizzled(start + mn / 64 * leading + k / 8 * stride + k % 8 * 128 + mn % 64 * 2)], 2);
  return value;
}

void covariance(int64_t N, int64_t D, int64_t splits) {
  std::vector<uint16_t> x(N * D);
  uint32_t seed = 7;
  for (uint16_t& value : x) value = (seed = seed * 1664525u + 1013904223u) >> 29;
  std::vector<int64_t> workspace(splits * share_cells(D), -1);

  for (int64_t split = 0; split < splits; ++split) {
    const int64_t tokens = split_tokens(N, splits), first = split * tokens;
    const int64_t last = first + tokens < N ? first + tokens : N;
    for (int64_t number = 0; number < tiles_of(D); ++number) {
      const Tile tile = tile_at(number, D);
      if (first_tile(tile.row, D) + tile.column != number) fail("tile", number, tile.row);
      std::vector<int64_t> sums(kRanks * kCells);
      for (int64_t token = first; token < last; token += kStep) {
        Shared shared[kRanks] = {Shared(kStepBytes, 0xff), Shared(kStepBytes, 0xff)};
        int arrived[kRanks] = {};
        for (int rank = 0; rank < kRanks; ++rank) {
          for (int b = 0; b < kBoxes; ++b) {
            const Box box = box_of(b, rank, tile);
            for (int to = 0; to < kRanks; ++to) {
              if (to != rank && !box.shared) continue;
              copy(x, N, D, box.column, token + box.token, shared[to], box.offset);
              arrived[to] += kBoxBytes;
            }
          }
        }
        for (int rank = 0; rank < kRanks; ++rank) {
          if (arrived[rank] != kStepBytes) fail("bytes of a step", arrived[rank], kStepBytes);
          for (int group = 0; group < 2; ++group) {
            for (int k16 = 0; k16 < kStep / 16; ++k16) {
              const uint64_t a = operand(group * kBlockBytes + k16 * kSixteenRows);
              const uint64_t b = operand(kColumnsOffset + k16 * kSixteenRows);
              for (int k = 0; k < 16; ++k) {
                for (int m = 0; m < 64; ++m) {
                  const int64_t left = read(shared[rank], a, m, k);
                  int64_t* row = &sums[(rank * kTileRows + group * 64 + m) * kTileColumns];
                  for (int n = 0; left != 0 && n < kTileColumns; ++n) row[n] += left * read(shared[rank], b, n, k);
                }
              }
            }
          }
        }
      }
      for (int rank = 0; rank < kRanks; ++rank) {
        int64_t* cells = &workspace[split * share_cells(D) + (number * kRanks + rank) * kCells];
        for (int group = 0; group < 2; ++group) {
          for (int thread = 0; thread < 128; ++thread) {
            for (int c = 0; c < kTileColumns / 2; ++c) {
              const int row = group * 64 + accumulator_row(thread, c), column = accumulator_column(thread, c);
              int64_t& cell = cells[row * kTileColumns + column];
              if (cell != -1) fail("a cell was written twice", row, column);
              cell = sums[(rank * kTileRows + row) * kTileColumns + column];
            }
          }
        }
      }
    }
  }

  for (int64_t row = 0; row < D; ++row) {
    for (int64_t column = 0; column <= row; ++column) {
      int64_t total = 0, expected = 0;
      for (int64_t split = 0; split < splits; ++split)
        total += workspace[split * share_cells(D) + cell_of(row, column, D)];
      for (int64_t token = 0; token < N; ++token) expected += x[token * D + row] * x[token * D + column];
      if (total != expected) fail("covariance differs at", row, column);
      const int64_t piece = cell_of(row / 32 * 32, column / 32 * 32, D);
      if (cell_of(row, column, D) != piece + row % 32 * kTileColumns + column % 32)
        fail("a piece of 32 x 32", row, column);
    }
  }
}

void plans() {
  for (int sms : {1, 114, 132}) {
    for (int64_t D : {1, 576, 2872, 4096, 8192}) {
      for (int64_t N : {1, 64, 65, 1000, 65536, 1000000}) {
        const int splits = choose_splits(N, D, sms);
        const int64_t tokens = split_tokens(N, splits);
        if (splits < 1 || tokens % kStep != 0 || tokens > kLongestSplit) fail("split", splits, tokens);
        if (tokens * splits < N || tokens * (splits - 1) >= N) fail("splits cover N", splits, N);
      }
    }
  }
  const double computed = static_cast<double>(share_cells(4096)) / (4096.0 * 4096.0 / 2);
  if (computed > 1.1)
    fail("per mille of the triangle computed at D = 4096", static_cast<int64_t>(1000 * computed), 1100);
}

}  // namespace

int main() {
  covariance(1, 8, 1);
  covariance(70, 17, 1);
  covariance(130, 300, 2);
  covariance(64, 520, 1);
  plans();
  return 0;
}
