// Runs the decode kernels' data flow on the CPU: every block, warp, lane and load through the functions of decode.h,
// the tensor core's instruction by its definition, against plain sums. All values are small integers, so equal means
// equal.
#include "cuda/decode.h"

#include <cstdio>
#include <cstdlib>
#include <vector>

using namespace sgf::decode;

namespace {

using Matrix = std::vector<uint16_t>;
constexpr uint16_t kPoison = 30000;  // beside the matrices: what a stray load would bring in

[[noreturn]] void fail(const char* what, int64_t a, int64_t b) {
  std::printf("%s: %lld %lld\n", what, static_cast<long long>(a), static_cast<long long>(b));
  std::exit(1);
}

// rows x cols small numbers in rows of `stride`, amid poison.
Matrix filled(int64_t rows, int64_t cols, int64_t stride, uint32_t seed) {
  Matrix matrix(rows * stride + 64, kPoison);
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

// What add_up() does: out[m][slot] and square[m] gain this warp's sums.
template <class Slot>
void add_up(const Warp& sums, Slot slot, int64_t (&out)[kMaxRows][kTileRows], int64_t (&square)[kMaxRows]) {
  int written[kMaxRows][kTileRows] = {};
  for (int index = 0; index < 32; ++index) {
    const Lane lane = lane_of(index);
    for (int block = 0; block < 2; ++block) {
      for (int i = 0; i < kBlocks16; ++i) {
        for (int c = 0; c < 4; ++c) {
          const int m = 8 * block + accumulator_column(lane.member, c);
          const int s = slot(lane.group, i, accumulator_half(c));
          out[m][s] += sums.tile[i][block][index][c];
          ++written[m][s];
        }
      }
      square[8 * block + lane.group] += sums.square[index][block];
    }
  }
  for (auto& row : written) {
    for (int times : row) {
      if (times != 1) fail("a cell was written this often", times, 0);
    }
  }
}

// Rows that the activations do not have must count as zeros.
void check_padding(const int64_t (&out)[kMaxRows][kTileRows], int M) {
  for (int m = M; m < kMaxRows; ++m) {
    for (int64_t value : out[m]) {
      if (value != 0) fail("a row beyond M holds", m, value);
    }
  }
}

int64_t dot(const uint16_t* a, int64_t step_a, const uint16_t* b, int64_t step_b, int64_t K) {
  int64_t sum = 0;
  for (int64_t k = 0; k < K; ++k) sum += static_cast<int64_t>(a[k * step_a]) * b[k * step_b];
  return sum;
}

void norm_linear(int M, int64_t scaled, int64_t unscaled, bool gated, int K, int splits) {
  const int64_t n = scaled + unscaled, stride = K + 3, columns = gated ? scaled / 2 : scaled;
  const Matrix x = filled(M, K, stride, 1), weight = filled(n, K, stride, 2);
  std::vector<int> seen(n), stored(M * (columns + unscaled));
  for (int64_t tile = 0; tile < norm_tiles(scaled, unscaled, gated); ++tile) {
    const NormTile rows = norm_tile(tile, scaled, unscaled, gated);
    int64_t out[kMaxRows][kTileRows] = {}, square[kMaxRows] = {};
    for (int split = 0; split < splits; ++split) {
      const Chunks chunks = chunks_of(chunks_in(K), split, splits);
      for (int warp = 0; warp < kWarps; ++warp) {
        KMajor w[32];
        Activations a[32];
        Warp sums;
        for (int lane = 0; lane < 32; ++lane) {
          w[lane] = halves_of(weight.data(), stride, K, rows, lane_of(lane));
          a[lane] = activations_of(x.data(), stride, M, K, lane_of(lane));
        }
        stream(w, a, chunks, warp, sums);
        add_up(sums, halves_slot, out, square);
      }
    }
    check_padding(out, M);
    for (int slot = 0; slot < kTileRows; ++slot) {
      const int half = slot / kHalfRows, index = slot % kHalfRows;
      if (index >= rows.count[half]) continue;
      const int64_t row = rows.first[half] + index;
      if (row >= n || rows.scaled != (row < scaled)) fail("slot and row", slot, row);
      ++seen[row];
      for (int m = 0; m < M; ++m) {
        if (out[m][slot] != dot(&x[m * stride], 1, &weight[row * stride], 1, K)) fail("norm_linear differs at", m, row);
        if (gated && rows.scaled && half == 1) continue;
        const int64_t column = rows.column + slot;
        if (column != (row < scaled ? row : columns + row - scaled)) fail("column of row", column, row);
        ++stored[m * (columns + unscaled) + column];
      }
      if (gated && rows.scaled && half == 0 && rows.first[1] + index != row + scaled / 2) fail("up row of", row, slot);
    }
    for (int m = 0; m < M; ++m) {
      if (square[m] != dot(&x[m * stride], 1, &x[m * stride], 1, K)) fail("sum of squares", m, square[m]);
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
  const Matrix x = filled(M, K, stride, 3), weight = filled(n, K, stride, 4);
  const Matrix x2 = filled(M, K2, stride_x2, 5);
  const Matrix weight2 = along_n ? filled(K2, n, stride2, 6) : filled(n, K2, stride2, 6);
  const int chunks1 = chunks_in(K);
  for (int64_t tile = 0; tile < ceil_div(n, kTileRows); ++tile) {
    int64_t out[kMaxRows][kTileRows] = {}, square[kMaxRows] = {};
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
          w[index] = runs_of(weight.data(), stride, n, K, tile, lane);
          w2[index] = runs_of(weight2.data(), stride2, n, K2, tile, lane);
          columns[index] = columns_of(weight2.data(), stride2, n, K2, tile, lane);
          a[index] = activations_of(x.data(), stride, M, K, lane);
          a2[index] = activations_of(x2.data(), stride_x2, M, K2, lane);
        }
        stream(w, a, first, warp, sums);
        if (along_n) {
          stream(columns, a2, second, warp, sums);
        } else {
          stream(w2, a2, second, warp, sums);
        }
        add_up(sums, runs_slot, out, square);
      }
    }
    check_padding(out, M);
    for (int slot = 0; slot < kTileRows && tile * kTileRows + slot < n; ++slot) {
      const int64_t row = tile * kTileRows + slot;
      for (int m = 0; m < M; ++m) {
        const int64_t expected =
            dot(&x[m * stride], 1, &weight[row * stride], 1, K) +
            dot(&x2[m * stride_x2], 1, along_n ? &weight2[row] : &weight2[row * stride2], along_n ? stride2 : 1, K2);
        if (out[m][slot] != expected) fail("residual_linear differs at", m, row);
      }
    }
  }
}

void plans() {
  for (int sms : {1, 108, 132}) {
    for (int64_t tiles : {1, 45, 48, 192, 344, 100000}) {
      for (int chunks : {1, 7, 96, 440}) {
        const int splits = choose_splits(tiles, chunks, sms);
        if (splits < 1 || splits > kMaxSplits) fail("splits", splits, chunks);
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
  if (choose_splits(48, 440, 132) < 3) fail("few tiles leave SMs idle", choose_splits(48, 440, 132), 0);
}

}  // namespace

int main() {
  for (bool gated : {false, true}) {
    norm_linear(1, 64, 0, gated, 32, 1);
    norm_linear(3, 34, 17, gated, 33, 1);
    norm_linear(8, 200, 70, gated, 600, 3);
    norm_linear(9, 2, 0, gated, 7, 1);
    norm_linear(16, 130, 1, gated, 264, 2);
    norm_linear(5, 0, 40, gated, 40, 1);
  }
  for (bool along_n : {false, true}) {
    residual_linear(1, 64, 32, 32, along_n, 1);
    residual_linear(3, 17, 33, 26, along_n, 1);
    residual_linear(16, 136, 264, 145, along_n, 3);
    residual_linear(9, 200, 8, 600, along_n, 5);
    residual_linear(4, 70, 300, 0, along_n, 2);
  }
  plans();
  return 0;
}
