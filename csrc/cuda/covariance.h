// Index arithmetic of the covariance kernel, for device and host: the triangle of tiles, what the copy engine brings
// where, and how the tensor cores find it.
//
// A cluster of two blocks computes 256 rows x 192 columns of X^T X, a block (its rank) 128 of the rows. Both read the
// same 192 columns of X, so each brings half of them and the copy engine writes that half into both blocks. A step is
// 64 tokens, in shared memory as blocks of 64 tokens x 64 columns with 128-byte rows and the 128-byte swizzle:
//
//     rows' operand      2 blocks of 8 KB   [column / 64][token][column % 64]
//     columns' operand   3 blocks of 8 KB
//
// A box, what one copy brings, is half a block: 32 tokens x 64 columns, 4 KB.
#pragma once

#include "cuda/hopper.h"

namespace sgf::covariance {

using sgf::ceil_div;

using hopper::kRanks;

constexpr int kTileRows = 128;  // of one rank
constexpr int kTileColumns = 192;
constexpr int kClusterRows = kRanks * kTileRows;
constexpr int kStep = 64;   // tokens
constexpr int kBlock = 64;  // columns, 128 bytes
constexpr int kBoxTokens = kStep / kRanks;
constexpr int kBlockBytes = kStep * kBlock * 2;
constexpr int kBoxBytes = kBoxTokens * kBlock * 2;
constexpr int kRowBoxes = kTileRows / kBlock * 2;
constexpr int kBoxes = kRowBoxes + kTileColumns / kBlock;  // that one rank brings per step
constexpr int kStepBytes = (kTileRows + kTileColumns) / kBlock * kBlockBytes;
constexpr int kColumnsOffset = kTileRows / kBlock * kBlockBytes;
// Steps of one MMA chain: the tensor core truncates at every addition, so chains stay short. By the published model of
// its arithmetic (arXiv 2512.07004) white noise errs by 9e-7 over 256 tokens in fp16, 4e-7 over 128, and 4e-7 over 256
// in bf16, whose products have fewer bits to lose.
template <bool kBfloat16>
constexpr int kChain = kBfloat16 ? 4 : 2;
constexpr int kCells = kTileRows * kTileColumns;
constexpr int64_t kLongestSplit = 65536;  // tokens: bounds the rounding of the sum of the chains

// Tiles of cluster row i that meet the lower triangle of [D, D].
SGF_INLINE int64_t tiles_in_row(int64_t i, int64_t D) {
  const int64_t reached = (i * kClusterRows + kClusterRows - 1) / kTileColumns + 1, all = ceil_div(D, kTileColumns);
  return reached < all ? reached : all;
}

// Tiles are numbered along the rows, from the top. The number of the first one in row i:
SGF_INLINE int64_t first_tile(int64_t i, int64_t D) {
  int64_t tiles = 0;
  for (int64_t row = 0; row < i; ++row) tiles += tiles_in_row(row, D);
  return tiles;
}

SGF_INLINE int64_t tiles_of(int64_t D) { return first_tile(ceil_div(D, kClusterRows), D); }

struct Tile {
  int64_t row, column;  // in tiles
};

SGF_INLINE Tile tile_at(int64_t tile, int64_t D) {
  int64_t row = 0;
  for (; tile >= tiles_in_row(row, D); ++row) tile -= tiles_in_row(row, D);
  return {row, tile};
}

// Where element (row, column) of the lower triangle lies in one split's share of the workspace.
SGF_INLINE int64_t cell_of(int64_t row, int64_t column, int64_t D) {
  const int64_t tile = first_tile(row / kClusterRows, D) + column / kTileColumns;
  return (tile * kClusterRows + row % kClusterRows) * kTileColumns + column % kTileColumns;
}

SGF_INLINE int64_t share_cells(int64_t D) { return tiles_of(D) * kRanks * kCells; }

// Box b of a rank: columns from `column` and tokens from `token` of the step, to `offset` of the step's shared memory;
// of both ranks, where `shared`.
struct Box {
  int64_t column;
  int token, offset;
  bool shared;
};

SGF_INLINE Box box_of(int b, int rank, Tile tile) {
  if (b < kRowBoxes) {
    return {tile.row * kClusterRows + rank * kTileRows + b / 2 * kBlock, b % 2 * kBoxTokens,
            b / 2 * kBlockBytes + b % 2 * kBoxBytes, false};
  }
  const int block = b - kRowBoxes;
  return {tile.column * kTileColumns + block * kBlock, rank * kBoxTokens,
          kColumnsOffset + block * kBlockBytes + rank * kBoxBytes, true};
}

// Descriptor of 16 tokens at this address, for either operand.
SGF_INLINE uint64_t operand(uint32_t address) { return hopper::descriptor(address, kBlockBytes); }

// Tokens of each split, and how many splits finish first under a model that has not been measured yet: clusters run in
// waves, and each costs kClusterOverhead tokens for filling its pipeline and writing its tile.
constexpr int kMaxSplits = 64;
constexpr int64_t kClusterOverhead = 1024;

SGF_INLINE int64_t split_tokens(int64_t N, int64_t splits) { return ceil_div(ceil_div(N, splits), kStep) * kStep; }

inline int choose_splits(int64_t N, int64_t D, int sms) {
  const int64_t clusters = sms > kRanks ? sms / kRanks : 1, tiles = tiles_of(D), fewest = ceil_div(N, kLongestSplit);
  int64_t best = fewest, best_cost = INT64_MAX;
  for (int64_t splits = fewest; splits == fewest || (splits <= kMaxSplits && splits * kClusterOverhead <= N);
       ++splits) {
    const int64_t cost = ceil_div(tiles * splits, clusters) * (split_tokens(N, splits) + kClusterOverhead);
    if (cost < best_cost) best = splits, best_cost = cost;
  }
  return static_cast<int>(ceil_div(N, split_tokens(N, best)));
}

}  // namespace sgf::covariance
