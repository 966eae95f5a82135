// Index arithmetic of the decode kernels (M <= 16): which lane loads what, and what it multiplies. For device and host.
//
// A tile is kTileRows rows of the weight, that is, columns of the output. A warp takes one chunk of kChunk k at a time
// through two steps of mma.m16n8k16 for each of four 16-row blocks i: the weight is A, the activations are B. Lane
// 4 * group + member holds, by the instruction's definition,
//
//     A  rows group and group + 8, k 2 member + {0, 1} and 2 member + {8, 9}
//     B  column group (a row of the activations), the same k
//     C  rows group and group + 8, columns 2 member + {0, 1}
//
// A dot product does not care about the order of k, nor a tile about that of its rows, as long as both operands and the
// result agree. So the order is the one that makes 16-byte loads come out as fragments: member takes the 8 neighbouring
// k from 8 * member of the chunk, 4 for each step, and each (i, half), with half 0 for A's row group and 1 for group +
// 8, stands for a row ("slot") of the tile:
//
//     halves   slot = 32 half + 4 group + i    half 0 and half 1 may lie apart in the weight: gate and up rows
//     runs     slot = 8 group + 2 i + half     8 neighbouring columns per lane, which is one load of a row-major S
//
// Eight loads of 16 bytes are one chunk of weight either way: 8 rows of k neighbours, or 8 k of row neighbours.
#pragma once

#include <cstdint>

#include "arithmetic.h"
#include "cuda/tiles.h"

namespace sgf::decode {

using sgf::ceil_div, sgf::clamp;

constexpr int kMaxRows = 16;        // M
constexpr int kMaxWidth = 1 << 30;  // K: a row's offsets are 32-bit, those of rows 64-bit
constexpr int kTileRows = 64;       // rows of the weight
constexpr int kHalfRows = kTileRows / 2;
constexpr int kChunk = 32;  // k
constexpr int kBlocks16 = kTileRows / 16;
constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kLoads = 8;   // of 16 bytes per lane and chunk
constexpr int kVector = 8;  // elements of 16 bits in one load

struct Vector {
  uint32_t pair[4];
};

// A row-major matrix of 16-bit elements. `vectors`: each of its rows consists of whole, aligned 16-byte vectors.
struct Matrix {
  const uint16_t* data;
  int64_t stride;
  bool vectors;
};

struct Lane {
  int group, member;
};

SGF_INLINE Lane lane_of(int lane) { return {lane >> 2, lane & 3}; }

SGF_INLINE int halves_slot(int group, int i, int half) { return kHalfRows * half + 4 * group + i; }

SGF_INLINE int runs_slot(int group, int i, int half) { return 8 * group + 2 * i + half; }

// Of a C fragment's four values: the half of the row, and the column.
SGF_INLINE int accumulator_half(int c) { return c >> 1; }

SGF_INLINE int accumulator_column(int member, int c) { return 2 * member + (c & 1); }

// A tile of norm_linear, slots in halves.
using NormTile = tiles::Tile<int64_t>;

SGF_INLINE int64_t norm_tiles(int64_t scaled, int64_t unscaled, bool gated) {
  return tiles::tiles_across(kTileRows, scaled, unscaled, gated);
}

SGF_INLINE NormTile norm_tile(int64_t tile, int64_t scaled, int64_t unscaled, bool gated) {
  return tiles::tile_at(kTileRows, tile, scaled, unscaled, gated);
}

// One lane's share of an operand whose rows are contiguous along k: load v of a chunk is row (i, half) = (v / 2,
// v % 2).
struct KMajor {
  const uint16_t* row[2];  // of i = 0, at this member's first k
  int rows[2];             // how many i there are
  int64_t step;            // elements from i to i + 1
  int K;                   // that are left from this member's first

  SGF_INLINE const uint16_t* at(int chunk, int v) const { return row[v % 2] + v / 2 * step + chunk * kChunk; }
  // Elements of the load that exist; the others count as zero.
  SGF_INLINE int count(int chunk, int v) const { return v / 2 < rows[v % 2] ? clamp(K - chunk * kChunk, kVector) : 0; }
  static SGF_INLINE void fragment(const Vector (&loaded)[kLoads], int step, int i, uint32_t (&a)[4]) {
    a[0] = loaded[2 * i].pair[2 * step];
    a[1] = loaded[2 * i + 1].pair[2 * step];
    a[2] = loaded[2 * i].pair[2 * step + 1];
    a[3] = loaded[2 * i + 1].pair[2 * step + 1];
  }
};

SGF_INLINE KMajor halves_of(const Matrix& weight, int K, const NormTile& tile, Lane lane) {
  const uint16_t* origin = weight.data + 4 * lane.group * weight.stride + lane.member * kVector;
  return {{origin + tile.first[0] * weight.stride, origin + tile.first[1] * weight.stride},
          {clamp(tile.count[0] - 4 * lane.group, kBlocks16), clamp(tile.count[1] - 4 * lane.group, kBlocks16)},
          weight.stride,
          K - lane.member * kVector};
}

SGF_INLINE KMajor runs_of(const Matrix& weight, int64_t n, int K, int64_t tile, Lane lane) {
  const int64_t row = tile * kTileRows + 8 * lane.group;
  const uint16_t* origin = weight.data + row * weight.stride + lane.member * kVector;
  return {{origin, origin + weight.stride},
          {clamp((n - row + 1) / 2, kBlocks16), clamp((n - row) / 2, kBlocks16)},
          2 * weight.stride,
          K - lane.member * kVector};
}

// One lane's share of S [K, n], contiguous along n, in runs: load v of a chunk is k = 8 member + v, columns 8 group and
// after.
struct NMajor {
  const uint16_t* column;  // at this member's first k
  int64_t stride;
  int columns;
  int K;

  SGF_INLINE const uint16_t* at(int chunk, int v) const { return column + (chunk * kChunk + v) * stride; }
  SGF_INLINE int count(int chunk, int v) const { return chunk * kChunk + v < K ? columns : 0; }
  static SGF_INLINE void fragment(const Vector (&loaded)[kLoads], int step, int i, uint32_t (&a)[4]) {
    for (int pair = 0; pair < 2; ++pair) {
      const uint32_t even = loaded[4 * step + 2 * pair].pair[i], odd = loaded[4 * step + 2 * pair + 1].pair[i];
      a[2 * pair] = (even & 0xffff) | (odd << 16);
      a[2 * pair + 1] = (even >> 16) | (odd & 0xffff0000);
    }
  }
};

SGF_INLINE NMajor columns_of(const Matrix& S, int64_t n, int K, int64_t tile, Lane lane) {
  const int64_t first = tile * kTileRows + 8 * lane.group;
  return {S.data + first + lane.member * kVector * S.stride, S.stride, clamp(n - first, kVector),
          K - lane.member * kVector};
}

// One lane's share of the activations x [M, K]: load `block` of a chunk is row 8 block + group.
struct Activations {
  const uint16_t* row;  // of block 0, at this member's first k
  int rows;             // how many blocks have this row
  int64_t step;         // elements from block to block
  int K;
  bool vectors;

  SGF_INLINE const uint16_t* at(int chunk, int block) const { return row + block * step + chunk * kChunk; }
  SGF_INLINE int count(int chunk, int block) const { return block < rows ? clamp(K - chunk * kChunk, kVector) : 0; }
  static SGF_INLINE void fragment(const Vector& loaded, int step, uint32_t (&b)[2]) {
    b[0] = loaded.pair[2 * step];
    b[1] = loaded.pair[2 * step + 1];
  }
};

SGF_INLINE Activations activations_of(const Matrix& x, int M, int K, Lane lane) {
  return {x.data + lane.group * x.stride + lane.member * kVector, clamp((M - lane.group + 7) / 8, 2), 8 * x.stride,
          K - lane.member * kVector, x.vectors};
}

// The chunks of one split: [first, last). Warp w of the block takes first + w, first + w + kWarps, ...
struct Chunks {
  int first, last;
};

// Of any K, for a plan is made before the launcher checks its sizes: no sum overflows.
SGF_INLINE int chunks_in(int K) { return K / kChunk + (K % kChunk != 0); }

SGF_INLINE Chunks chunks_of(int chunks, int split, int splits) {
  const int each = ceil_div(chunks, splits);
  return {split * each, split * each + each < chunks ? split * each + each : chunks};
}

constexpr int kBlocksPerSm = 2;  // at once, which leaves a thread 128 registers

// A split's chunks of the first operand pair, which has `chunks1` of them, and those of the second one, from its start.
SGF_INLINE Chunks before(Chunks chunks, int chunks1) {
  return {chunks.first, chunks.last < chunks1 ? chunks.last : chunks1};
}

SGF_INLINE Chunks after(Chunks chunks, int chunks1) {
  return {chunks.first > chunks1 ? chunks.first - chunks1 : 0, chunks.last - chunks1};
}

// A share is what a warp or a block has summed of a tile: rows of kTileRows slots, and behind each the activations' sum
// of squares in one more cell, which makes the pitch odd and rows start in different banks. Shares are added up in
// order, first the warps' in shared memory, then the splits'. Through both sums a thread owns every kThreads-th quad of
// cells; the last quad of M rows may reach into the next row, which means nothing there.
constexpr int kPitch = kTileRows + 1;
constexpr int kSquare = kTileRows;  // its slot

SGF_INLINE constexpr int padded_rows(int M) { return M <= 8 ? 8 : 16; }

SGF_INLINE constexpr int share_cells(int rows) { return rows * kPitch; }

SGF_INLINE constexpr int cell_of(int m, int slot) { return m * kPitch + slot; }

constexpr int kQuad = 4;

SGF_INLINE constexpr int own_quads(int rows) { return ceil_div(share_cells(rows) / kQuad, kThreads); }

SGF_INLINE constexpr int own_quad(int thread, int j) { return kQuad * (thread + j * kThreads); }

// fp32 cells of the workspace in which the splits' shares meet, [tiles][splits], where blocks form no clusters. A
// single split needs none.
SGF_INLINE int64_t shares_cells(int64_t tiles, int splits, int M) {
  return splits > 1 ? tiles * splits * share_cells(padded_rows(M)) : 0;
}

// Once a tile is added up, a thread finishes the rows that own_row numbers, in one slot.
SGF_INLINE constexpr int own_rows(int rows) { return rows * kTileRows / kThreads; }

SGF_INLINE constexpr int own_row(int thread, int j) { return thread / kTileRows + j * (kThreads / kTileRows); }

SGF_INLINE constexpr int own_slot(int thread) { return thread % kTileRows; }

// How many blocks share one tile's chunks, a power of two so that they can form a cluster: the cheapest under a model
// that has not been measured yet. A last wave of less than a block per SM does not saturate memory, nor one of less
// than two for more than 8 rows, which leave registers for half the loads. Each block costs kBlockOverhead chunks for
// starting and adding up.
constexpr int kMaxSplits = 8;  // the largest cluster that every GPU with clusters takes
constexpr int kBlockOverhead = 16;

SGF_INLINE bool is_cluster(int splits) { return splits >= 1 && splits <= kMaxSplits && (splits & (splits - 1)) == 0; }

inline int choose_splits(int64_t tiles, int chunks, int M, int sms) {
  const int64_t slots = kBlocksPerSm * sms, saturating = M <= 8 ? sms : slots;
  int best = 1;
  int64_t best_cost = INT64_MAX;
  for (int splits = 1; splits <= kMaxSplits && (splits == 1 || splits * kWarps <= chunks); splits *= 2) {
    const int64_t blocks = tiles * splits, tail = blocks % slots;
    const int64_t streamed = blocks - tail + (tail == 0 ? 0 : tail > saturating ? tail : saturating);
    const int64_t cost = streamed * (ceil_div(chunks, splits) + kBlockOverhead);
    if (cost < best_cost) best = splits, best_cost = cost;
  }
  return best;
}

}  // namespace sgf::decode
