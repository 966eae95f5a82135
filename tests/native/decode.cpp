// Runs the decode kernels' data flow on the CPU: every block, warp, lane and load through the functions of decode.h,
// the tensor core's instruction by its definition, against plain sums. All values are small integers, so equal means
// equal.
#include "cuda/decode.h"

#include <cstdio>
#include <cstdlib>
#include <vector>

using namespace sgf::decode;

namespace {

using Elements = std::vector<uint16_t>;
constexpr uint16_t kPoison = 30000;  // beside the matrices: what a stray load would bring in

[[noreturn]] void fail(const char* what, int64_t a, int64_t b) {
  std::printf("%s: %lld %lld\n", what, static_cast<long long>(a), static_cast<long long>(b));
  std::exit(1);
}

// rows x cols small numbers in rows of `stride`, amid poison.
Elements filled(int64_t rows, int64_t cols, int64_t stride, uint32_t seed) {
  Elements matrix(rows * stride + 64, kPoison);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < cols; ++c) matrix[r * stride + c] = (seed = seed * 1664525u + 1013904223u) >> 29;
  }
  return matrix;
}

Vector load(const uint16_t* from, int count) {
  Vector loaded{};
  for (int e = 0; e < count; ++e) loaded.pair[e / 2] |= static_cast<uint32_t>(from[e]) << (16 * (e % 2));
  return loaded;
}

int element(uint32_t pair, int e) { return (pair >> (16 * e)) & 0xffff; }

// mma.m16n8k16 over the 32 lanes of a warp, by the fragment layouts in the PTX manual.
void mma(int64_t (&d)[32][4], const uint32_t (&a)[32][4], const uint32_t (&b)[32][2]) {
  int64_t A[16][16], B[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const int group = lane / 4, member = lane % 4;
    for (int r = 0; r < 4; ++r) {
      for (int e = 0; e < 2; ++e) A[group + 8 * (r % 2)][2 * member + 8 * (r / 2) + e] = element(a[lane][r], e);
    }
    for (int r = 0; r < 2; ++r) {
      for (int e = 0; e < 2; ++e) B[2 * member + 8 * r + e][group] = element(b[lane][r], e);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    for (int c = 0; c < 4; ++c) {
      for (int k = 0; k < 16; ++k) d[lane][c] += A[lane / 4 + 8 * (c / 2)][k] * B[k][2 * (lane % 4) + c % 2];
    }
  }
}

struct Warp {
  int64_t tile[kBlocks16][2][32][4] = {};
  int64_t square[32][2] = {};
};

// What decode.cuh's stream() does, for the 32 lanes of one warp.
template <class Weight>
void stream(const Weight (&weight)[32], const Activations (&x)[32], Chunks chunks, int warp, Warp& sums) {
  for (int chunk = chunks.first + warp; chunk < chunks.last; chunk += kWarps) {
    Vector loaded[32][kLoads], loaded_x[32][2];
    for (int lane = 0; lane < 32; ++lane) {
      for (int v = 0; v < kLoads; ++v) loaded[lane][v] = load(weight[lane].at(chunk, v), weight[lane].count(chunk, v));
      for (int block = 0; block < 2; ++block) {
        loaded_x[lane][block] = load(x[lane].at(chunk, block), x[lane].count(chunk, block));
        for (int e = 0; e < kVector; ++e) {
          const int64_t value = element(loaded_x[lane][block].pair[e / 2], e % 2);
          sums.square[lane][block] += value * value;
        }
      }
    }
    for (int step = 0; step < 2; ++step) {
      for (int i = 0; i < kBlocks16; ++i) {
        for (int block = 0; block < 2; ++block) {
          uint32_t a[32][4], b[32][2];
          for (int lane = 0; lane < 32; ++lane) {
            Weight::fragment(loaded[lane], step, i, a[lane]);
            Activations::fragment(loaded_x[lane][block], step, b[lane]);
          }
          mma(sums.tile[i][block], a, b);
        }
      }
    }
  }
}

constexpr int64_t kUnwritten = int64_t{1} << 40;

using Share = std::vector<int64_t>;

// A block's shared memory.
struct Block {
  Share share[kWarps];
};

// What a warp stores for add_up(): the rows up to M. Rows that the activations do not have must count as zeros.
template <class Slot>
void store(const Warp& sums, Slot slot, int M, Share& share) {
  const int columns = padded_rows(M);
  share.assign(share_cells(columns), kUnwritten);
  const auto write = [&](int cell, int64_t value) {
    if (share.at(cell) != kUnwritten) fail("a cell was written twice", cell, 0);
    share[cell] = value;
  };
  for (int block = 0; block < columns / 8; ++block) {
    int64_t square[8] = {};
    for (int index = 0; index < 32; ++index) {
      const Lane lane = lane_of(index);
      for (int i = 0; i < kBlocks16; ++i) {
        for (int c = 0; c < 4; ++c) {
          const int m = 8 * block + accumulator_column(lane.member, c);
          const int64_t value = sums.tile[i][block][index][c];
          if (m < M) write(cell_of(m, slot(lane.group, i, accumulator_half(c))), value);
          if (m >= M && value != 0) fail("a row beyond M holds", m, value);
        }
      }
      square[lane.group] += sums.square[index][block];
    }
    for (int group = 0; group < 8; ++group) write(cell_of(8 * block + group, kSquare), square[group]);
  }
}

// Each thread's quads of M rows, and that every cell of those rows has one owner, whose quads lie aligned in the share.
template <class Use>
void each_own_quad(int M, Use use) {
  std::vector<int> owners(share_cells(padded_rows(M)));
  for (int thread = 0; thread < kThreads; ++thread) {
    for (int j = 0; j < own_quads(padded_rows(M)); ++j) {
      const int quad = own_quad(thread, j);
      if (quad >= share_cells(M)) continue;
      if (quad % kQuad != 0) fail("a quad is not aligned", quad, thread);
      for (int cell = quad; cell < quad + kQuad; ++cell) {
        ++owners.at(cell);
        use(cell);
      }
    }
  }
  for (int cell = 0; cell < share_cells(M); ++cell) {
    if (owners[cell] != 1) fail("owners of a cell", owners[cell], cell);
  }
}

// What add_up() does: the warps' shares become the first one's in each block of the tile, and the blocks' (a cluster,
// or what they left in the workspace) those of rank 0.
const Share& add_up(std::vector<Block>& ranks, int M) {
  for (Block& block : ranks) {
    each_own_quad(M, [&](int cell) {
      for (int warp = 1; warp < kWarps; ++warp) block.share[0][cell] += block.share[warp][cell];
    });
  }
  each_own_quad(M, [&](int cell) {
    for (size_t rank = 1; rank < ranks.size(); ++rank) ranks[0].share[0][cell] += ranks[rank].share[0][cell];
  });
  return ranks[0].share[0];
}

// Each output of a tile that some thread finishes, and that every one of M rows and all slots is finished once.
template <class Use>
void each_own_output(int M, Use use) {
  std::vector<int> finished(M * kTileRows);
  for (int thread = 0; thread < kThreads; ++thread) {
    for (int j = 0; j < own_rows(padded_rows(M)); ++j) {
      const int m = own_row(thread, j), slot = own_slot(thread);
      if (m >= M) continue;
      ++finished.at(m * kTileRows + slot);
      use(m, slot);
    }
  }
  for (int times : finished) {
    if (times != 1) fail("an output of a tile was finished this often", times, 0);
  }
}

int64_t dot(const uint16_t* a, int64_t step_a, const uint16_t* b, int64_t step_b, int64_t K) {
  int64_t sum = 0;
  for (int64_t k = 0; k < K; ++k) sum += static_cast<int64_t>(a[k * step_a]) * b[k * step_b];
  return sum;
}

void norm_linear(int M, int64_t scaled, int64_t unscaled, bool gated, int K, int splits) {
  const int64_t n = scaled + unscaled, stride = K + 3, columns = gated ? scaled / 2 : scaled;
  const Elements x = filled(M, K, stride, 1), weight = filled(n, K, stride, 2);
  std::vector<int> seen(n), stored(M * (columns + unscaled));
  for (int64_t tile = 0; tile < norm_tiles(scaled, unscaled, gated); ++tile) {
    const NormTile rows = norm_tile(tile, scaled, unscaled, gated);
    std::vector<Block> ranks(splits);
    for (int split = 0; split < splits; ++split) {
      const Chunks chunks = chunks_of(chunks_in(K), split, splits);
      for (int warp = 0; warp < kWarps; ++warp) {
        KMajor w[32];
        Activations a[32];
        Warp sums;
        for (int lane = 0; lane < 32; ++lane) {
          w[lane] = halves_of({weight.data(), stride, false}, K, rows, lane_of(lane));
          a[lane] = activations_of({x.data(), stride, false}, M, K, lane_of(lane));
        }
        stream(w, a, chunks, warp, sums);
        store(sums, halves_slot, M, ranks[split].share[warp]);
      }
    }
    const Share& total = add_up(ranks, M);
    each_own_output(M, [&](int m, int slot) {
      const int half = slot / kHalfRows, index = slot % kHalfRows;
      if (index >= rows.count[half]) return;
      const int64_t row = rows.first[half] + index;
      if (row >= n || rows.scaled != (row < scaled)) fail("slot and row", slot, row);
      seen[row] += m == 0;
      const int64_t expected = dot(&x[m * stride], 1, &weight[row * stride], 1, K);
      if (total[cell_of(m, slot)] != expected) fail("norm_linear differs at", m, row);
      if (gated && rows.scaled && half == 1) return;
      const int64_t column = rows.column + slot;
      if (column != (row < scaled ? row : columns + row - scaled)) fail("column of row", column, row);
      ++stored[m * (columns + unscaled) + column];
      if (gated && rows.scaled && rows.first[1] + index != row + scaled / 2) fail("up row of", row, slot);
    });
    for (int m = 0; m < M; ++m) {
      const int64_t square = total[cell_of(m, kSquare)];
      if (square != dot(&x[m * stride], 1, &x[m * stride], 1, K)) fail("sum of squares", m, square);
    }
  }
  for (int64_t row = 0; row < n; ++row) {
    if (seen[row] != 1) fail("a row was taken this often", row, seen[row]);
  }
  for (int times : stored) {
    if (times != 1) fail("an output was stored this often", times, 0);
  }
}

void residual_linear(int M, int64_t n, int K, int K2, bool along_n, int splits) {
  const int64_t stride = K + 1, stride_x2 = K2 + 2, stride2 = along_n ? n + 5 : K2 + 5;
  const Elements x = filled(M, K, stride, 3), weight = filled(n, K, stride, 4);
  const Elements x2 = filled(M, K2, stride_x2, 5);
  const Elements weight2 = along_n ? filled(K2, n, stride2, 6) : filled(n, K2, stride2, 6);
  const int chunks1 = chunks_in(K);
  for (int64_t tile = 0; tile < ceil_div(n, kTileRows); ++tile) {
    std::vector<Block> ranks(splits);
    for (int split = 0; split < splits; ++split) {
      const Chunks chunks = chunks_of(chunks1 + chunks_in(K2), split, splits);
      const Chunks first = before(chunks, chunks1), second = after(chunks, chunks1);
      for (int warp = 0; warp < kWarps; ++warp) {
        KMajor w[32], w2[32];
        NMajor columns[32];
        Activations a[32], a2[32];
        Warp sums;
        for (int index = 0; index < 32; ++index) {
          const Lane lane = lane_of(index);
          w[index] = runs_of({weight.data(), stride, false}, n, K, tile, lane);
          w2[index] = runs_of({weight2.data(), stride2, false}, n, K2, tile, lane);
          columns[index] = columns_of({weight2.data(), stride2, false}, n, K2, tile, lane);
          a[index] = activations_of({x.data(), stride, false}, M, K, lane);
          a2[index] = activations_of({x2.data(), stride_x2, false}, M, K2, lane);
        }
        stream(w, a, first, warp, sums);
        if (along_n) {
          stream(columns, a2, second, warp, sums);
        } else {
          stream(w2, a2, second, warp, sums);
        }
        store(sums, runs_slot, M, ranks[split].share[warp]);
      }
    }
    const Share& total = add_up(ranks, M);
    each_own_output(M, [&](int m, int slot) {
      const int64_t row = tile * kTileRows + slot;
      if (row >= n) return;
      const int64_t expected =
          dot(&x[m * stride], 1, &weight[row * stride], 1, K) +
          dot(&x2[m * stride_x2], 1, along_n ? &weight2[row] : &weight2[row * stride2], along_n ? stride2 : 1, K2);
      if (total[cell_of(m, slot)] != expected) fail("residual_linear differs at", m, row);
    });
  }
}

void plans() {
  for (int sms : {1, 108, 132}) {
    for (int64_t tiles : {1, 45, 48, 192, 344, 100000}) {
      for (int chunks : {1, 7, 96, 440}) {
        const int splits = choose_splits(tiles, chunks, 1, sms);
        if (!is_cluster(splits)) fail("splits", splits, chunks);
        int covered = 0;
        for (int split = 0; split < splits; ++split) {
          const Chunks part = chunks_of(chunks, split, splits);
          if (part.first < part.last && part.first != covered) fail("a gap before chunk", part.first, covered);
          if (part.first < part.last) covered = part.last;
        }
        if (covered != chunks) fail("chunks covered", covered, chunks);
        if (splits > 1 && tiles >= 100000) fail("many tiles need no splits", tiles, splits);
      }
    }
  }
  if (choose_splits(48, 440, 1, 132) != 4) fail("few tiles leave SMs idle", choose_splits(48, 440, 1, 132), 4);
  if (choose_splits(132, 96, 8, 132) != 1) fail("a block per SM is enough", choose_splits(132, 96, 8, 132), 1);
  if (choose_splits(132, 96, 9, 132) != 2) fail("more rows want two", choose_splits(132, 96, 9, 132), 2);
}

}  // namespace

int main() {
  for (bool gated : {false, true}) {
    norm_linear(1, 64, 0, gated, 32, 1);
    norm_linear(3, 34, 17, gated, 33, 1);
    norm_linear(8, 200, 70, gated, 600, 4);
    norm_linear(9, 2, 0, gated, 7, 1);
    norm_linear(16, 130, 1, gated, 264, 2);
    norm_linear(5, 0, 40, gated, 40, 1);
  }
  for (bool along_n : {false, true}) {
    residual_linear(1, 64, 32, 32, along_n, 1);
    residual_linear(3, 17, 33, 26, along_n, 1);
    residual_linear(16, 136, 264, 145, along_n, 4);
    residual_linear(9, 200, 8, 600, along_n, 8);
    residual_linear(4, 70, 300, 0, along_n, 2);
  }
  plans();
  return 0;
}
