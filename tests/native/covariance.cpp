// The index arithmetic of the covariance kernel: tiles, cells, boxes, splits.
#include "cuda/covariance.h"

#include "expect.h"

using namespace sgf::covariance;
using namespace sgf::hopper;

namespace {

// Of every element of the lower triangle: its tile, and its cell, one in each split's share of the workspace.
void triangle(int64_t D) {
  for (int64_t number = 0; number < tiles_of(D); ++number) {
    const Tile tile = tile_at(number, D);
    expect(first_tile(tile.row, D) + tile.column == number, "a tile's number is that of its place", number, D);
    expect(tile.row * kClusterRows < D && tile.column * kTileColumns < D, "a tile meets the matrix", number, D);
    expect(tile.column * kTileColumns < (tile.row + 1) * kClusterRows, "a tile meets the lower triangle", number, D);
  }
  Cells cells("no two elements of the triangle have the same cell", share_cells(D));
  for (int64_t row = 0; row < D; ++row) {
    for (int64_t column = 0; column <= row; ++column) {
      const int64_t cell = cell_of(row, column, D);
      cells.take(cell);
      const int64_t number = cell / (kRanks * kCells), rank = cell / kCells % kRanks;
      const Tile tile = tile_at(number, D);
      expect(tile.row == row / kClusterRows && tile.column == column / kTileColumns,
             "the cell is in the element's tile", row, column);
      expect(tile.row * kClusterRows + rank * kTileRows + cell % kCells / kTileColumns == row, "rows of a rank's cells",
             row, cell);
      expect(tile.column * kTileColumns + cell % kTileColumns == column, "columns of a rank's cells", column, cell);
      const int64_t piece = cell_of(row / 32 * 32, column / 32 * 32, D);
      expect(cell == piece + row % 32 * kTileColumns + column % 32, "a piece of 32 x 32 lies in one tile", row, column);
    }
  }
}

// What one step leaves in a block's shared memory: [column / 64][token][column % 64] of its rows, and of the columns.
void boxes(Tile tile) {
  for (int to = 0; to < kRanks; ++to) {
    Cells lines("each 128 bytes of a step are brought once", kStepBytes / kRowBytes);
    for (int rank = 0; rank < kRanks; ++rank) {
      for (int b = 0; b < kBoxes; ++b) {
        const Box box = box_of(b, rank, tile);
        if (to != rank && !box.shared) continue;
        expect(box.offset % kEightRows == 0, "a box starts where the swizzle does", b, box.offset);
        const bool is_left = box.offset < kColumnsOffset;
        expect(is_left != box.shared, "both blocks share the columns only", b, rank);
        const int64_t origin = is_left ? tile.row * kClusterRows + to * kTileRows : tile.column * kTileColumns;
        for (int token = box.token; token < box.token + kBoxTokens; ++token) {
          const int at = (is_left ? 0 : kColumnsOffset) + static_cast<int>(box.column - origin) / kBlock * kBlockBytes +
                         token * kRowBytes;
          expect(box.offset + (token - box.token) * kRowBytes == at, "a token lies in its place", b, token);
          lines.take(at / kRowBytes);
        }
      }
    }
    lines.expect_all();
  }
  const int block = static_cast<int>(operand(0) >> 16 & 0x3fff) << 4;
  expect(block == kBlockBytes, "the next 64 columns are the next block", block);
}

void splits() {
  for (int sms : {1, 2, 114, 132}) {
    for (int64_t D : {1, 576, 2872, 4096, 8192}) {
      for (int64_t N : {1, 64, 65, 1000, 65536, 65537, 1000000, INT32_MAX / 2}) {
        const int64_t splits = choose_splits(N, D, sms), tokens = split_tokens(N, splits);
        expect(splits >= 1 && tokens * splits >= N, "the splits take all tokens", splits, N);
        expect(tokens * (splits - 1) < N, "no split is empty", splits, N);
        expect(tokens % kStep == 0 && tokens <= kLongestSplit, "a split is so many steps", tokens, N);
        expect(splits <= kMaxSplits || splits <= ceil_div(N, kLongestSplit), "there are not more than help", splits, N);
      }
    }
  }
  expect(choose_splits(65536, 64, 132) > 1, "few tiles are split", choose_splits(65536, 64, 132));
  expect(choose_splits(1000, 8192, 132) == 1, "many tiles are not", choose_splits(1000, 8192, 132));
  expect(share_cells(4096) * 10 <= 4096 * 4096 / 2 * 11, "a tenth of the tiles stands over", share_cells(4096));
}

}  // namespace

int main() {
  for (int64_t D : {1, 17, 192, 193, 256, 257, 520, 769}) triangle(D);
  for (Tile tile : {Tile{0, 0}, Tile{3, 5}}) boxes(tile);
  splits();
  return 0;
}
