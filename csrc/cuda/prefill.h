// Index arithmetic of the prefill kernels (M > 16): who computes which tile, what the copy engine brings where, and who
// stores what. For device and host.
//
// A cluster of two blocks computes 256 rows x W columns of y, a block (its rank) 128 of the rows, a warpgroup 64; those
// without a row of y multiply nothing. W is one of kWidths. Where rows are few, `splits` clusters share a tile's k and
// leave their sums to another kernel. Tiles are dealt out in turn to as many clusters as run at once, in bands of kBand
// tiles of rows, so that clusters that run together share rows of both operands, which stay in L2:
//
//          columns ->
//     +----------------+
//     | 0  2  4  6  .. |   band of kBand rows of tiles (two are drawn), numbered down, then right
//     | 1  3  5  7  .. |
//     +----------------+
//     | next band      |
//
// A step is 64 k of one operand pair. A stage of shared memory holds one step, in rows of 128 bytes:
//
//     left                   [128 rows of this rank][64 k]                        16 KB
//     right, along K         [2 halves][W / 2 rows of the weight][64 k]           W x 128 bytes
//     right, along N         [W / 64 blocks, rounded up][64 k][64 columns]        8 KB each: the room for both
//
// Both blocks multiply with the same right operand, so each rank brings one share of it and the copy engine writes that
// into both: a half of the rows, or a half of the k. The halves may lie apart in the weight: gate rows and up rows.
//
// A warpgroup computes 64 rows. Four threads, a quad, hold 32 neighbouring columns (a chunk) of a row as pairs of
// columns, member 0 .. 3 the pairs 8 block + 2 member. Transposed over the quad, a member has 8 neighbouring columns (a
// run): 16 bytes of y, and a quad stores 64 neighbouring bytes. Of the last chunk there may be a half, two blocks.
#pragma once

#include <cmath>

#include "cuda/hopper.h"
#include "cuda/tiles.h"

namespace sgf::prefill {

using sgf::ceil_div, sgf::clamp;

using hopper::kRanks;
using hopper::kRowBytes;

constexpr int kTileRows = 128;  // of one rank
constexpr int kClusterRows = kRanks * kTileRows;
constexpr int kGroupRows = 64;  // of one of the two warpgroups
constexpr int kStep = 64;       // k
constexpr int kBlock = 64;      // columns of a right operand along N
constexpr int kBlockBytes = kStep * kRowBytes;
constexpr int kLeftBytes = kTileRows * kRowBytes;
constexpr int kChunk = 32;
constexpr int kRun = 8;
constexpr int kBand = 8;
constexpr int kMaxSize = 1 << 30;  // of M, n and K: so rows, columns and k fit 32 bits, which offsets do not
constexpr int kSharedLimit = 227 << 10;
constexpr int kWidths[] = {256, 240, 224, 208, 192, 160, 128};

template <int kWidth>
struct Shape {
  static constexpr int kHalf = kWidth / 2;
  static constexpr int kAccumulators = kWidth / 2;  // of a thread
  static constexpr int kChunks = ceil_div(kWidth, kChunk);
  static constexpr int kBlocks = ceil_div(kWidth, kBlock);
  static constexpr int kStageBytes = kLeftBytes + kBlocks * kBlockBytes;
  static constexpr int kBroughtAlongK = kLeftBytes + kWidth * kRowBytes;  // bytes of a step; along N all of a stage
  // The swizzle wants 1024-byte alignment; the barriers take the rest.
  static constexpr int kStages = (kSharedLimit - 2048) / kStageBytes;
  static constexpr int kSharedBytes = kStages * kStageBytes + 1024;
  // Steps that the first warpgroup is ahead of the second: the stages between them are not free for the copy engine,
  // which keeps two (of W = 128, three) for a trip to L2.
  static constexpr int kLead = (kStages - 1) / 2;
};

// Of any K, for a plan is made before the launcher checks its sizes.
SGF_INLINE int steps_in(int K) { return K / kStep + (K % kStep != 0); }

using Columns = tiles::Tile<int>;
using tiles::tiles_across;

SGF_INLINE int64_t tiles_in(int width, int M, int scaled, int unscaled, bool gated) {
  return static_cast<int64_t>(ceil_div(M, kClusterRows)) * tiles_across(width, scaled, unscaled, gated);
}

SGF_INLINE Columns columns_of(int width, int tile, int scaled, int unscaled, bool gated) {
  return tiles::tile_at(width, tile, scaled, unscaled, gated);
}

constexpr int64_t kMaxTiles = INT32_MAX / kBand;  // 64-bit divisions are long

struct Place {
  int row, column;  // in tiles of a cluster
  int split;
};

// The splits of a tile follow one another.
SGF_INLINE Place place_of(int item, int rows, int columns, int splits) {
  const int tile = item / splits, band = tile / (kBand * columns), top = band * kBand, in_band = tile - top * columns;
  const int height = rows - top < kBand ? rows - top : kBand;
  return {top + in_band % height, in_band / height, item - tile * splits};
}

// The steps of one split, [first, last): all but the last split have `each` of them.
struct Steps {
  int first, last;

  SGF_INLINE int count() const { return last - first; }
};

SGF_INLINE Steps steps_of(int split, int each, int steps) {
  const int first = split * each;
  return {first, first + each < steps ? first + each : steps};
}

// What one copy brings: the box at (x, y) of the operand's matrix, to `to` of the stage, of both blocks or this one.
struct Box {
  int x, y;
  int to;
  bool both;
};

SGF_INLINE Box left_box(int k, int row, int rank) { return {k, row * kClusterRows + rank * kTileRows, 0, false}; }

SGF_INLINE Box right_box_along_k(int width, int k, const Columns& columns, int rank) {
  return {k, rank == 0 ? columns.first[0] : columns.first[1], kLeftBytes + rank * (width / 2) * kRowBytes, true};
}

constexpr int kBoxStep = kStep / kRanks;  // k of a box of a right operand along N

SGF_INLINE Box right_box_along_n(int block, int k, const Columns& columns, int rank) {
  return {columns.column + block * kBlock, k + rank * kBoxStep,
          kLeftBytes + block * kBlockBytes + rank * kBoxStep * kRowBytes, true};
}

// Descriptors of 16 k, for a stage at this address.
SGF_INLINE uint64_t left_operand(uint32_t stage, int group, int sixteenth) {
  return hopper::descriptor(stage + group * kGroupRows * kRowBytes + sixteenth * 32, 0);
}

SGF_INLINE uint64_t right_operand(uint32_t stage, int sixteenth, bool along_n) {
  const uint32_t right = stage + kLeftBytes;
  return along_n ? hopper::descriptor(right + sixteenth * hopper::kSixteenRows, kBlockBytes)
                 : hopper::descriptor(right + sixteenth * 32, 0);
}

// The stage that comes next, and the parity of its round: the consumers of a stage wait for `parity` of its full
// barrier, its producer for the other one of the empty barrier, which in the first round does not wait.
template <int kStages>
struct Ring {
  int stage = 0;
  uint32_t parity = 0;

  SGF_INLINE void next() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
};

// The step of a tile after which the first warpgroup lets the second one begin it. Where tiles have fewer steps than
// the ring has stages, it might pass on two turns before the second one takes any: then there are no turns, which is
// -1.
template <int kWidth>
SGF_INLINE int lead_of(int steps) {
  return steps < Shape<kWidth>::kStages ? -1 : Shape<kWidth>::kLead - 1;
}

// Per stage: warps that say that they have read it. Both ranks bring parts of it, so each waits for the warps of both.
constexpr int kReaders = 8 * kRanks;

// The first of the two accumulators for pair 8 block + 2 member of a chunk, in the thread's first row or the one 8
// below.
SGF_INLINE int accumulator_of(int chunk, int block, int below) { return 16 * chunk + 4 * block + 2 * below; }

// Transposes a 4 x 4 matrix of words, of which each member of a quad holds a row: for bit = 1 and 2, for i = 0 and 1,
// members that differ in that bit send each other one word.
SGF_INLINE uint32_t outgoing(const uint32_t (&x)[4], int member, int bit, int i) {
  const int low = bit == 1 ? 2 * i : i;
  return member & bit ? x[low] : x[low + bit];
}

SGF_INLINE void incoming(uint32_t (&x)[4], int member, int bit, int i, uint32_t word) {
  const int low = bit == 1 ? 2 * i : i;
  x[low] = member & bit ? word : x[low];
  x[low + bit] = member & bit ? x[low + bit] : word;
}

// Whether a chunk has that block: of the last one there may be a half.
SGF_INLINE constexpr bool has_block(int width, int chunk, int block) { return chunk * kChunk + block * kRun < width; }

// A member's eight neighbouring columns of a chunk, of which `count` exist.
struct Run {
  int row;     // of the weight, which is also where its bias stands
  int column;  // of y
  int count;
};

SGF_INLINE Run run_of(int width, const Columns& columns, int chunk, int member) {
  const int half = width / 2, at = chunk * kChunk + member * kRun;
  const int within = at < half ? at : at - half;
  const int first = at < half ? columns.first[0] : columns.first[1];
  return {first + within, columns.column + at, clamp((at < half ? columns.count[0] : columns.count[1]) - within, kRun)};
}

// How the work is dealt out: the width of tiles and how many clusters share the k of each.
struct Deal {
  int width, splits;
};

// The deal that ends first under a model that has not been measured yet. A step takes 2 W clocks of tensor cores for
// each 64 rows of a block, or as long as its operands take to come: from L2 at kBytesPerClock, and from memory at
// kMissBytes where one row of tiles is all there is, so that no two clusters read the same of the weight. A tile costs
// kTileOverhead clocks for what does not overlap. All of it takes no less than the weight to come from memory,
// kMemoryBytes per SM and clock: where few rows leave the tensor cores idle, more clusters are of no use. Splits write
// and read their sums, 4 bytes each, at kSumBytes per SM and clock.
constexpr int kBytesPerClock = 40;
constexpr int kMissBytes = 26;
constexpr int kTileOverhead = 1000;
constexpr int kMemoryBytes = 13;
constexpr int kSumBytes = 16;
constexpr int kMaxSplits = 8;
constexpr int kSplitRows = 512;  // with more rows there are tiles enough

inline double clocks_of(Deal deal, int M, int64_t across, int steps, int sms) {
  const int64_t clusters = sms > kRanks ? sms / kRanks : 1, tiles = ceil_div(M, kClusterRows) * across;
  const int rows = M < kTileRows ? M : kTileRows;
  const int multiplied = 2 * deal.width * ceil_div(rows, kGroupRows);
  const int left = rows * kRowBytes / kBytesPerClock;
  const int right = deal.width * kRowBytes / kRanks / (M <= kClusterRows ? kMissBytes : kBytesPerClock);
  const double each =
      static_cast<double>(ceil_div(steps, deal.splits)) * (multiplied > left + right ? multiplied : left + right) +
      kTileOverhead;
  const double columns = static_cast<double>(across) * deal.width;
  const double worked = static_cast<double>(ceil_div(tiles * deal.splits, clusters)) * each;
  const double streamed = columns * kRowBytes * steps / (kMemoryBytes * sms) + kTileOverhead;
  const double sums = deal.splits == 1 ? 0 : deal.splits * columns * M * 4 / (kSumBytes * sms);
  return (worked > streamed ? worked : streamed) + sums;
}

// No split is without a step.
inline Deal choose_deal(int M, int scaled, int unscaled, bool gated, int steps, int sms, bool may_split) {
  Deal best{};
  double least = INFINITY;
  for (int width : kWidths) {
    const int across = tiles_across(width, scaled, unscaled, gated);
    for (int splits = 1; splits == 1 || (may_split && M <= kSplitRows && splits <= kMaxSplits); ++splits) {
      if (ceil_div(steps, ceil_div(steps, splits)) != splits) continue;
      const double clocks = clocks_of({width, splits}, M, across, steps, sms);
      if (clocks < least) best = {width, splits}, least = clocks;
    }
  }
  return best;
}

inline bool is_width(int width) {
  for (int each : kWidths) {
    if (width == each) return true;
  }
  return false;
}

// fp32 cells that a launch of residual_linear leaves for the kernel after it: sums of squares of y, [tiles across][M],
// or the sums of the splits, [splits][M][columns of all tiles].
SGF_INLINE int64_t cells_of(Deal deal, int64_t M, int64_t n) {
  const int64_t across = ceil_div(n, deal.width);
  return deal.splits == 1 ? across * M : deal.splits * M * across * deal.width;
}

}  // namespace sgf::prefill
