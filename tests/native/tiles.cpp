// The tiles of a weight: who takes which of its rows, and which columns of the output.
#include "cuda/tiles.h"

#include "expect.h"

using namespace sgf::tiles;

namespace {

template <class Integer>
void rows_and_columns(int width, Integer scaled, Integer unscaled, bool gated) {
  const Integer stored = gated ? scaled / 2 : scaled;
  Cells rows("each row of the weight is in one tile", scaled + unscaled);
  Cells columns("each column of y is in one tile", stored + unscaled);
  for (Integer number = 0; number < tiles_across(width, scaled, unscaled, gated); ++number) {
    const Tile<Integer> tile = tile_at(width, number, scaled, unscaled, gated);
    expect(tile.scaled == (number < scaled_tiles(width, scaled, gated)), "scaled tiles stand first", number, scaled);
    for (int half = 0; half < 2; ++half) {
      for (int index = 0; index < tile.count[half]; ++index) {
        const Integer row = tile.first[half] + index;
        rows.take(row);
        expect(tile.scaled == (row < scaled), "a tile's rows are all scaled or all unscaled", row, number);
        if (gated && tile.scaled && half == 1) {
          expect(row == tile.first[0] + index + stored, "a gate stands beside its up", row, number);
          continue;
        }
        const Integer column = tile.column + half * (width / 2) + index;
        columns.take(column);
        expect(column == (row < scaled ? row : row - scaled + stored), "a row's column", row, column);
      }
    }
  }
  rows.expect_all();
  columns.expect_all();
}

// The last tile of the largest weight, whose rows' numbers just fit.
template <class Integer>
void largest(int width, Integer most) {
  const Integer last = tiles_across<Integer>(width, most, 0, true) - 1;
  const auto gates = tile_at<Integer>(width, last, most, 0, true);
  expect(gates.first[0] + gates.count[0] == most / 2, "the last gate", gates.first[0], gates.count[0]);
  expect(gates.first[1] + gates.count[1] == most, "the last up", gates.first[1], gates.count[1]);
}

template <class Integer>
void all(Integer most) {
  for (int width : {64, 128, 160, 192, 208, 224, 240, 256}) {
    for (bool gated : {false, true}) {
      for (Integer scaled : {0, 2, 34, 64, 66, 130, 200, width - 6, width, 2 * width + 100}) {
        for (Integer unscaled : {0, 1, 40, 64, 70, width + 9})
          rows_and_columns<Integer>(width, scaled, unscaled, gated);
      }
    }
    largest<Integer>(width, most);
  }
}

void arithmetic() {
  for (int64_t a = 0; a < 100; ++a) {
    for (int b = 1; b < 10; ++b) {
      const int64_t quotient = sgf::ceil_div(a, b);
      expect(quotient * b >= a && (quotient - 1) * b < a, "a quotient is rounded up", a, b);
    }
  }
  expect(sgf::ceil_div(1 << 30, 256) == 1 << 22, "a quotient of the largest size", sgf::ceil_div(1 << 30, 256));
  expect(sgf::clamp(-3, 8) == 0 && sgf::clamp(5, 8) == 5, "a number below and within", sgf::clamp(5, 8));
  expect(sgf::clamp(int64_t{1} << 40, 8) == 8, "a number above", sgf::clamp(int64_t{1} << 40, 8));
}

}  // namespace

int main() {
  all<int>(1 << 30);
  all<int64_t>(int64_t{1} << 40);
  arithmetic();
  return 0;
}
