// Tiles of a weight [scaled + unscaled rows, K], for device and host: which of its rows, that is, which columns of the
// output, the decode and the prefill kernels take at a time.
//
// A tile is `width` rows, as two halves that may lie apart in the weight: under a gated activation a half is gate rows,
// the other one the up rows of the same columns. Scaled tiles stand first, and no tile straddles the scaled and the
// unscaled rows. Rows are numbered by an Integer of 32 bits where they fit it, for 64-bit divisions are long.
#pragma once

#include "arithmetic.h"

namespace sgf::tiles {

// Slots 0 .. width / 2 - 1 are the weight's rows from first[0], the others those from first[1], as many of each as
// count[] says.
template <class Integer>
struct Tile {
  bool scaled;
  Integer first[2];
  int count[2];
  Integer column;  // of the output, for slot 0
};

template <class Integer>
SGF_INLINE Integer scaled_tiles(int width, Integer scaled, bool gated) {
  return gated ? ceil_div(scaled / 2, width / 2) : ceil_div(scaled, width);
}

template <class Integer>
SGF_INLINE Integer tiles_across(int width, Integer scaled, Integer unscaled, bool gated) {
  return scaled_tiles(width, scaled, gated) + ceil_div(unscaled, width);
}

template <class Integer>
SGF_INLINE Tile<Integer> tile_at(int width, Integer tile, Integer scaled, Integer unscaled, bool gated) {
  const int half = width / 2;
  const Integer before = scaled_tiles(width, scaled, gated), stored = gated ? scaled / 2 : scaled;
  const bool is_scaled = tile < before;
  if (is_scaled && gated) {
    const Integer column = tile * half;
    const int count = clamp(stored - column, half);
    return {true, {column, stored + column}, {count, count}, column};
  }
  const Integer row = is_scaled ? tile * width : scaled + (tile - before) * width;
  const Integer left = (is_scaled ? scaled : scaled + unscaled) - row;
  return {is_scaled,
          {row, row + half},
          {clamp(left, half), clamp(left - half, half)},
          is_scaled ? row : stored + row - scaled};
}

}  // namespace sgf::tiles
