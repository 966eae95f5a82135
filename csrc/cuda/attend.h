// Index arithmetic of attend: who has which positions, which lane loads what, and what it multiplies. For device and
// host.
//
// A tile is up to kRows queries that read one key and value head: those of all heads that share it, of all tokens. A
// warp takes kStep positions at a time through mma.m16n8k16, twice: the queries by the keys, then the probabilities by
// the values. Lane 4 * group + member holds what decode.h says of A, B and C, and again the order of a sum is chosen so
// that 16-byte loads from the cache, as it lies, come out as fragments:
//
//     keys     B's column is a position. member takes the 8 neighbouring numbers from 8 * member of every 32: two steps
//     scores   C's columns are positions 2 member + {0, 1} of 8, two blocks of them: as they stand, the A of the next
//     values   B's k is a position: member loads 2 member + {0, 1, 8, 9}. Its columns are numbers: group loads the 8
//              neighbouring ones from 8 * group of every 64, which are B's column `group` in 8 blocks
#pragma once

#include <cstdint>

#include "arithmetic.h"

namespace sgf::attend {

using sgf::ceil_div, sgf::clamp;

constexpr int kRows = 16;   // queries of a tile
constexpr int kStep = 16;   // positions that a warp takes at a time
constexpr int kVector = 8;  // elements of 16 bits in one load
constexpr int kChunk = 32;  // numbers of a key that four lanes load at a time
constexpr int kGroup = 64;  // numbers of a value that eight lanes load at a time
constexpr int kMaxSize = 256;
constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kBlockStep = kWarps * kStep;

// Of the scores' fragment of block j, value c: the half of the rows, and the position of the step.
SGF_INLINE constexpr int score_half(int c) { return c >> 1; }
SGF_INLINE constexpr int score_position(int member, int j, int c) { return 8 * j + 2 * member + (c & 1); }

// Of a key's load: its position of the step.
SGF_INLINE constexpr int key_position(int group, int j) { return 8 * j + group; }

// Of a value's load v of 4: its position of the step.
SGF_INLINE constexpr int value_position(int member, int v) { return 2 * member + 8 * (v >> 1) + (v & 1); }

// Of the sums' fragment of block e of 8, value c: the number of a value among 64.
SGF_INLINE constexpr int sum_column(int member, int e, int c) { return 8 * (2 * member + (c & 1)) + e; }

// Positions [first, last) of one split of `start` cached ones and, for the last split, of the new tokens behind them.
struct Positions {
  int first, last;
};

SGF_INLINE Positions positions_of(int start, int tokens, int split, int splits) {
  const int each = ceil_div(ceil_div(start, kStep), splits) * kStep,
            first = split * each < start ? split * each : start;
  const int last = first + each < start ? first + each : start;
  return {first, split == splits - 1 ? start + tokens : last};
}

SGF_INLINE int tiles_of(int tokens, int heads, int groups) { return ceil_div(tokens * (heads / groups), kRows); }

// A share is what a block has summed: its rows' sums, maxima and sums of probabilities.
SGF_INLINE constexpr int share_cells(int size) { return kRows * (size + 2); }

// The template's size that serves a head's.
SGF_INLINE constexpr int padded_size(int size, bool vectors) {
  return vectors && size <= 64 ? 64 : vectors && size <= 128 ? 128 : kMaxSize;
}

// How many blocks share the positions of an item: the cheapest under a model that has not been measured yet. Blocks run
// in waves of one per SM, and each costs kOverhead steps for preparing its queries and adding up.
constexpr int kMaxSplits = 64;
constexpr int kOverhead = 2;

inline int choose_splits(int64_t items, int64_t positions, int sms) {
  const int64_t steps = ceil_div(positions, kBlockStep);
  int best = 1;
  int64_t best_cost = INT64_MAX;
  for (int splits = 1; splits <= kMaxSplits && (splits == 1 || splits <= steps); ++splits) {
    const int64_t cost = ceil_div(items * splits, sms) * (ceil_div(steps, splits) + kOverhead);
    if (cost < best_cost) best = splits, best_cost = cost;
  }
  return best;
}

}  // namespace sgf::attend
