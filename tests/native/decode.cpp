// The index arithmetic of the decode kernels: who loads which elements, how they meet in the tensor cores, and who adds
// up and finishes which cells of a tile.
#include "cuda/decode.h"

#include "expect.h"

using namespace sgf::decode;

namespace {

// No element of a matrix is read here, so strides may be as long as offsets must be.
constexpr int64_t kStride = int64_t{1} << 33;
const Matrix kMatrix{reinterpret_cast<const uint16_t*>(uintptr_t{1} << 40), kStride, false};

struct Element {
  int64_t row, column;
};

Element element_at(const uint16_t* at) {
  const int64_t offset = at - kMatrix.data;
  return {offset / kStride, offset % kStride};
}

// All lanes' loads of a matrix of `width` columns, of which element e of load v is at where(lane, k, v, e): k is the
// first of the lane's eight in its chunk.
template <class ShareOf, class Where>
void take_loads(ShareOf share_of, int loads, int K, int64_t width, Where where, Cells& elements) {
  for (int index = 0; index < 32; ++index) {
    const Lane lane = lane_of(index);
    const auto share = share_of(lane);
    for (int chunk = 0; chunk < chunks_in(K); ++chunk) {
      for (int v = 0; v < loads; ++v) {
        for (int e = 0; e < share.count(chunk, v); ++e) {
          const Element element = element_at(share.at(chunk, v) + e);
          const Element expected = where(lane, chunk * kChunk + lane.member * kVector, v, e);
          expect(element.row == expected.row, "a load's row", element.row, expected.row);
          expect(element.column == expected.column, "a load's column", element.column, expected.column);
          elements.take(element.row * width + element.column);
        }
      }
    }
  }
}

void loads_of_halves(int64_t scaled, int64_t unscaled, bool gated, int K) {
  Cells elements("each element of the weight is loaded once", (scaled + unscaled) * K);
  for (int64_t number = 0; number < norm_tiles(scaled, unscaled, gated); ++number) {
    const NormTile tile = norm_tile(number, scaled, unscaled, gated);
    const auto share = [&](Lane lane) { return halves_of(kMatrix, K, tile, lane); };
    const auto where = [&](Lane lane, int k, int v, int e) -> Element {
      const int slot = halves_slot(lane.group, v / 2, v % 2);
      return {tile.first[slot / kHalfRows] + slot % kHalfRows, k + e};
    };
    take_loads(share, kLoads, K, K, where, elements);
  }
  elements.expect_all();
}

void loads_of_runs(int64_t n, int K) {
  Cells elements("each element of the weight is loaded once", n * K), of_S("each element of S is loaded once", n * K);
  for (int64_t tile = 0; tile < ceil_div(n, kTileRows); ++tile) {
    const auto share = [&](Lane lane) { return runs_of(kMatrix, n, K, tile, lane); };
    const auto where = [&](Lane lane, int k, int v, int e) -> Element {
      return {tile * kTileRows + runs_slot(lane.group, v / 2, v % 2), k + e};
    };
    take_loads(share, kLoads, K, K, where, elements);
    const auto share_of_S = [&](Lane lane) { return columns_of(kMatrix, n, K, tile, lane); };
    const auto where_in_S = [&](Lane lane, int k, int v, int e) -> Element {
      return {k + v, tile * kTileRows + runs_slot(lane.group, e / 2, e % 2)};
    };
    take_loads(share_of_S, kLoads, K, n, where_in_S, of_S);
  }
  elements.expect_all();
  of_S.expect_all();
}

void loads_of_activations(int M, int K) {
  Cells elements("each activation is loaded once", M * K);
  const auto share = [&](Lane lane) { return activations_of(kMatrix, M, K, lane); };
  const auto where = [](Lane lane, int k, int block, int e) -> Element { return {8 * block + lane.group, k + e}; };
  take_loads(share, 2, K, K, where, elements);
  elements.expect_all();
}

// The loads of a lane as fragments, by their places in the PTX manual: A's register half + 2 u and B's register u hold
// the same two k, for each row (i, half). `label` numbers the elements of the weight's loads by row and k.
template <class Weight, class Label>
void fragments(Label label) {
  Vector loaded[kLoads]{}, x{};
  for (int e = 0; e < kVector; ++e) {
    for (int v = 0; v < kLoads; ++v) loaded[v].pair[e / 2] |= static_cast<uint32_t>(label(v, e)) << (16 * (e % 2));
    x.pair[e / 2] |= static_cast<uint32_t>(e) << (16 * (e % 2));
  }
  for (int i = 0; i < kBlocks16; ++i) {
    Cells ks("each k of a row is multiplied once", 2 * kVector);
    for (int step = 0; step < 2; ++step) {
      uint32_t a[4], b[2];
      Weight::fragment(loaded, step, i, a);
      Activations::fragment(x, step, b);
      for (int half = 0; half < 2; ++half) {
        for (int u = 0; u < 2; ++u) {
          for (int e = 0; e < 2; ++e) {
            const int of_a = a[half + 2 * u] >> (16 * e) & 0xffff, k = b[u] >> (16 * e) & 0xffff;
            expect(of_a == (2 * i + half) * kVector + k, "both operands agree on row and k", of_a, k);
            ks.take(half * kVector + k);
          }
        }
      }
    }
    ks.expect_all();
  }
}

// The splits' chunks, of two operand pairs in a row: all of them, in order.
void chunks_of_splits(int chunks1, int chunks2, int splits) {
  int next = 0;
  for (int split = 0; split < splits; ++split) {
    const Chunks part = chunks_of(chunks1 + chunks2, split, splits);
    const Chunks first = before(part, chunks1), second = after(part, chunks1);
    for (int chunk = first.first; chunk < first.last; ++chunk) {
      expect(chunk == next++ && chunk < chunks1, "the splits take the first pair's chunks in order", chunk, split);
    }
    for (int chunk = second.first; chunk < second.last; ++chunk) {
      expect(chunks1 + chunk == next++, "the splits take the second pair's chunks in order", chunk, split);
    }
  }
  expect(next == chunks1 + chunks2, "the splits take all chunks", next, splits);
}

// Where a warp's sums go: every slot of a row and its square have a cell of their own.
template <class Slot>
void cells_of_sums(int columns, Slot slot) {
  Cells cells("each cell of a share is written once", share_cells(columns));
  for (int m = 0; m < columns; ++m) cells.take(cell_of(m, kSquare));
  for (int index = 0; index < 32; ++index) {
    const Lane lane = lane_of(index);
    for (int block = 0; block < columns / 8; ++block) {
      for (int i = 0; i < kBlocks16; ++i) {
        for (int c = 0; c < 4; ++c) {
          const int m = 8 * block + accumulator_column(lane.member, c);
          cells.take(cell_of(m, slot(lane.group, i, accumulator_half(c))));
        }
      }
    }
  }
  cells.expect_all();
}

// Who adds up and who finishes the cells of M rows.
void owners(int M) {
  const int columns = padded_rows(M), used = share_cells(M);
  expect(M <= columns && columns <= kMaxRows, "rows are padded", M, columns);
  Cells quads("each quad of M rows has one owner", (used + kQuad - 1) / kQuad);
  Cells outputs("each output of a tile is finished once", columns * kTileRows);
  for (int thread = 0; thread < kThreads; ++thread) {
    for (int j = 0; j < own_quads(columns); ++j) {
      const int quad = own_quad(thread, j);
      if (quad >= used) continue;
      expect(quad % kQuad == 0 && quad + kQuad <= share_cells(columns), "a quad lies aligned in the share", quad, M);
      quads.take(quad / kQuad);
    }
    for (int j = 0; j < own_rows(columns); ++j) outputs.take(own_row(thread, j) * kTileRows + own_slot(thread));
  }
  quads.expect_all();
  outputs.expect_all();
  expect(shares_cells(5, 1, M) == 0, "one split needs no workspace", M);
  expect(shares_cells(5, 4, M) == 5 * 4 * share_cells(columns), "each tile's and split's share has room", M);
  expect(share_cells(columns) % kQuad == 0, "quads are aligned in every share", columns);
}

void plans() {
  for (int sms : {1, 108, 132}) {
    for (int64_t tiles : {1, 45, 48, 192, 344, 100000, INT32_MAX}) {
      for (int chunks : {1, 7, 96, 440, chunks_in(kMaxWidth)}) {
        for (int M : {1, 8, 9, 16}) {
          const int splits = choose_splits(tiles, chunks, M, sms);
          expect(is_cluster(splits), "splits form a cluster", splits, chunks);
          expect(splits == 1 || splits * kWarps <= chunks, "every warp has a chunk", splits, chunks);
          expect(splits == 1 || tiles < 100000 || chunks > 440, "many tiles need no splits", splits, tiles);
        }
      }
    }
  }
  expect(choose_splits(48, 440, 1, 132) == 4, "few tiles leave SMs idle", choose_splits(48, 440, 1, 132));
  expect(choose_splits(132, 96, 8, 132) == 1, "a block per SM is enough", choose_splits(132, 96, 8, 132));
  expect(choose_splits(132, 96, 9, 132) == 2, "more rows want two", choose_splits(132, 96, 9, 132));
  for (int splits : {-1, 0, 3, 12, 16}) expect(!is_cluster(splits), "these do not form a cluster", splits);
}

}  // namespace

int main() {
  for (bool gated : {false, true}) {
    for (int64_t scaled : {0, 2, 34, 64, 66, 130, 200}) {
      for (int64_t unscaled : {0, 1, 40, 64, 70}) loads_of_halves(scaled, unscaled, gated, 75);
    }
  }
  for (int64_t n : {1, 17, 64, 70, 136}) {
    for (int K : {0, 7, 32, 75}) loads_of_runs(n, K);
  }
  fragments<KMajor>([](int v, int e) { return v * kVector + e; });
  fragments<NMajor>([](int v, int e) { return e * kVector + v; });
  for (int columns : {8, 16}) {
    cells_of_sums(columns, halves_slot);
    cells_of_sums(columns, runs_slot);
  }
  for (int M = 1; M <= kMaxRows; ++M) {
    loads_of_activations(M, 75);
    owners(M);
  }
  for (int splits : {1, 2, 4, 8}) {
    for (int chunks1 : {1, 7, 8, 96, 345}) {
      for (int chunks2 : {0, 1, 90}) chunks_of_splits(chunks1, chunks2, splits);
    }
  }
  plans();
  return 0;
}
