// The index arithmetic of the prefill kernels: tiles, boxes, operands, accumulators and runs.
#include "cuda/prefill.h"

#include "expect.h"

using namespace sgf::prefill;

namespace {

void places(int rows, int across, int splits) {
  Cells items("each split of a tile has one place", rows * across * splits);
  int previous = 0;
  for (int item = 0; item < rows * across * splits; ++item) {
    const Place place = place_of(item, rows, across, splits);
    expect(place.row < rows && place.column < across, "a place is in the matrix", item, rows);
    expect(place.split == item % splits, "the splits of a tile follow one another", item, splits);
    expect(place.row / kBand >= previous, "one band comes after the other", item, rows);
    previous = place.row / kBand;
    items.take((place.row * across + place.column) * splits + place.split);
  }
  items.expect_all();
}

void steps(int total, int splits) {
  Cells taken("each step is in one split", total);
  const int each = sgf::ceil_div(total, splits);
  for (int split = 0; split < splits; ++split) {
    const Steps steps = steps_of(split, each, total);
    for (int step = steps.first; step < steps.last; ++step) taken.take(step);
    expect(steps.count() == steps.last - steps.first, "the number of steps", steps.count());
  }
  taken.expect_all();
}

// The runs of all tiles, as the epilogues load and store them.
void runs(int width, int scaled, int unscaled, bool gated) {
  const int stored = gated ? scaled / 2 : scaled;
  Cells rows("each row of the weight is in one run", scaled + unscaled);
  Cells cells("each column of y is in one run", stored + unscaled);
  for (int tile = 0; tile < tiles_across(width, scaled, unscaled, gated); ++tile) {
    const Columns columns = columns_of(width, tile, scaled, unscaled, gated);
    const bool paired = gated && columns.scaled;
    for (int chunk = 0; chunk < sgf::ceil_div(width, kChunk); ++chunk) {
      for (int member = 0; member < 4; ++member) {
        const int at = chunk * kChunk + member * kRun, half = width / 2;
        const Run run = run_of(width, columns, chunk, member);
        const bool up = paired && at >= half;
        const int beside = up ? at - half : at;
        const Run gate = run_of(width, columns, beside / kChunk, beside % kChunk / kRun);
        expect(has_block(width, chunk, member) || run.count == 0, "beyond the tile there is nothing", at, run.count);
        for (int e = 0; e < run.count; ++e) {
          const int row = run.row + e, column = run.column + e;
          rows.take(row);
          expect(columns.scaled == (row < scaled), "a tile's rows are all scaled or all unscaled", row, tile);
          if (up) {
            expect(row == gate.row + e + stored, "a gate stands beside its up", row, tile);
            continue;
          }
          cells.take(column);
          expect(column == (row < scaled ? row : row - scaled + stored), "a row's column", row, column);
        }
      }
    }
  }
  rows.expect_all();
  cells.expect_all();
}

// What one step leaves in a block's shared memory, of rows of 128 bytes.
void boxes(int width, int brought, const Columns& columns, bool along_n) {
  constexpr int k = 640, row = 3;
  for (int to = 0; to < kRanks; ++to) {
    Cells lines("each 128 bytes of a step are brought once", brought / kRowBytes);
    const auto land = [&](const Box& box, int rank, int height) {
      expect(box.to % sgf::hopper::kEightRows == 0, "a box starts where the swizzle does", box.to);
      for (int y = 0; y < height && (box.both || to == rank); ++y) lines.take(box.to / kRowBytes + y);
    };
    for (int rank = 0; rank < kRanks; ++rank) {
      const Box left = left_box(k, row, rank);
      expect(left.x == k && left.y == row * kClusterRows + rank * kTileRows, "a rank's rows", left.x, left.y);
      expect(left.to == 0 && !left.both, "a rank's rows are its own", left.to);
      land(left, rank, kTileRows);
      if (!along_n) {
        const Box right = right_box_along_k(width, k, columns, rank);
        expect(right.x == k && right.y == columns.first[rank], "a half of the weight's rows", right.x, right.y);
        expect(right.to == kLeftBytes + rank * width / 2 * kRowBytes && right.both, "goes to both", right.to);
        land(right, rank, width / 2);
        continue;
      }
      for (int block = 0; block < sgf::ceil_div(width, kBlock); ++block) {
        const Box right = right_box_along_n(block, k, columns, rank);
        const int at = right.to - kLeftBytes;
        expect(right.x == columns.column + at / kBlockBytes * kBlock, "columns lie in their block", right.x, right.to);
        expect(right.y == k + at % kBlockBytes / kRowBytes && right.both, "k lie in their rows", right.y, right.to);
        land(right, rank, kBoxStep);
      }
    }
    lines.expect_all();
  }
}

// Where the tensor cores find element mn of k, before the swizzle.
uint32_t address(uint64_t descriptor, bool along_mn, int mn, int k) {
  const auto field = [&](int bit) { return static_cast<uint32_t>(descriptor >> bit & 0x3fff) << 4; };
  return along_mn ? field(0) + mn / 64 * field(16) + k / 8 * field(32) + k % 8 * kRowBytes + mn % 64 * 2
                  : field(0) + mn / 8 * field(32) + mn % 8 * kRowBytes + k * 2;
}

void operands(uint32_t stage, int width) {
  for (int k = 0; k < kStep; ++k) {
    for (int m = 0; m < kTileRows; ++m) {
      const uint32_t at = address(left_operand(stage, m / kGroupRows, k / 16), false, m % kGroupRows, k % 16);
      expect(at == stage + m * kRowBytes + k * 2, "the left operand's rows", m, k);
    }
    for (int n = 0; n < width; ++n) {
      const uint32_t right = stage + kLeftBytes;
      expect(address(right_operand(stage, k / 16, false), false, n, k % 16) == right + n * kRowBytes + k * 2,
             "the right operand's rows", n, k);
      expect(address(right_operand(stage, k / 16, true), true, n, k % 16) ==
                 right + n / kBlock * kBlockBytes + k * kRowBytes + n % kBlock * 2,
             "the right operand's blocks", n, k);
    }
  }
}

void accumulators(int width) {
  Cells sums("each accumulator is in one pair", width / 2);
  for (int chunk = 0; chunk < sgf::ceil_div(width, kChunk); ++chunk) {
    for (int block = 0; block < 4 && has_block(width, chunk, block); ++block) {
      for (int below = 0; below < 2; ++below) {
        for (int e = 0; e < 2; ++e) {
          const int c = accumulator_of(chunk, block, below) + e;
          sums.take(c);
          for (int thread = 0; thread < 128; ++thread) {
            const int row = sgf::hopper::accumulator_row(thread, 0) + 8 * below;
            const int column = chunk * kChunk + 8 * block + 2 * (thread % 4) + e;
            expect(sgf::hopper::accumulator_row(thread, c) == row, "a pair's row", thread, c);
            expect(sgf::hopper::accumulator_column(thread, c) == column, "a pair's columns", thread, c);
          }
        }
      }
    }
  }
  sums.expect_all();
}

// Of the 4 x 4 words of a quad, numbered by row.
void transposition() {
  uint32_t words[4][4];
  for (uint32_t i = 0; i < 16; ++i) words[i / 4][i % 4] = i;
  for (int bit = 1; bit <= 2; ++bit) {
    for (int i = 0; i < 2; ++i) {
      uint32_t sent[4];
      for (int member = 0; member < 4; ++member) sent[member] = outgoing(words[member], member, bit, i);
      for (int member = 0; member < 4; ++member) incoming(words[member], member, bit, i, sent[member ^ bit]);
    }
  }
  for (uint32_t i = 0; i < 16; ++i) expect(words[i % 4][i / 4] == i, "a quad's words are transposed", i);
}

template <int kWidth>
void shapes() {
  using S = Shape<kWidth>;
  static_assert(S::kStages >= 4 && S::kLead >= 1 && S::kLead < S::kStages - 1, "room for a lead and for copies");
  static_assert(S::kSharedBytes + 2 * S::kStages * 8 <= kSharedLimit, "shared memory of a block");
  static_assert(S::kStageBytes % 1024 == 0 && kLeftBytes % 1024 == 0 && S::kHalf * kRowBytes % 1024 == 0, "alignment");
  static_assert(S::kHalf % kRun == 0, "no run has columns of both halves");
  static_assert(S::kBroughtAlongK <= S::kStageBytes, "a step has room in a stage");
  for (bool gated : {false, true}) {
    for (int scaled : {0, 2, kWidth - 6, kWidth, 2 * kWidth + 100}) {
      for (int unscaled : {0, 1, 40, kWidth + 9}) runs(kWidth, scaled, unscaled, gated);
    }
  }
  boxes(kWidth, S::kBroughtAlongK, columns_of(kWidth, 2, 1000, 0, false), false);
  boxes(kWidth, S::kStageBytes, columns_of(kWidth, 2, 1000, 0, false), true);
  boxes(kWidth, S::kBroughtAlongK, columns_of(kWidth, 2, 1000, 0, true), false);
  operands(3 * S::kStageBytes, kWidth);
  accumulators(kWidth);

  Ring<S::kStages> ring;
  for (int step = 0; step < 3 * S::kStages; ++step, ring.next()) {
    expect(ring.stage == step % S::kStages, "stages take turns", step, ring.stage);
    expect(ring.parity == static_cast<uint32_t>(step / S::kStages % 2), "rounds alternate", step, ring.parity);
  }
  for (int steps = 1; steps < 20; ++steps) {
    const int lead = lead_of<kWidth>(steps);
    expect(steps < S::kStages ? lead == -1 : lead >= 0 && lead < steps, "a turn is passed on in the tile", steps, lead);
  }
}

void sizes() {
  for (int rows : {1, 2, 7, 8, 9, 16, 21}) {
    for (int across : {1, 3, 12}) {
      for (int splits : {1, 3, 8}) places(rows, across, splits);
    }
  }
  for (int total : {8, 9, 64, 113}) {
    for (int splits : {1, 2, 8}) steps(total, splits);
  }
  const int most = static_cast<int>(kMaxTiles);
  const Place last = place_of(most - 1, 1, most, 1), lowest = place_of(most - 1, most, 1, 1);
  expect(last.row == 0 && last.column == most - 1, "the last of the most tiles across", last.row, last.column);
  expect(lowest.row == most - 1 && lowest.column == 0, "the last of the most tiles below", lowest.row, lowest.column);
  expect(steps_in(1) == 1 && steps_in(64) == 1 && steps_in(65) == 2, "steps", steps_in(65));
  expect(steps_in(kMaxSize) == kMaxSize / kStep, "the most steps", steps_in(kMaxSize));
}

// How much of the tensor cores' time the model expects a deal to use on 132 SMs, and how much of the tiles it computes
// is of use. K is that of a sliced Llama-2-7B's attention output with a dense shortcut.
double useful(Deal deal, int M, int n) {
  const int64_t waves = sgf::ceil_div(deal.splits * tiles_in(deal.width, M, n, 0, false), 66);
  return static_cast<double>(M) * n * deal.splits / (waves * 66 * kClusterRows * deal.width);
}

void deals() {
  for (int M : {1, 17, 64, 65, 128, 512, 513, 1000, 4096, kMaxSize}) {
    for (int n : {1, 193, 2872, 12288, kMaxSize}) {
      for (int sms : {1, 3, 132}) {
        for (int steps : {1, 7, 112}) {
          const Deal deal = choose_deal(M, n, 0, false, steps, sms, true);
          expect(is_width(deal.width), "a width there is", deal.width, n);
          expect(deal.splits >= 1 && deal.splits <= steps, "no split is without a step", deal.splits, steps);
          expect(sgf::ceil_div(steps, sgf::ceil_div(steps, deal.splits)) == deal.splits, "splits are even", steps);
          expect(deal.splits == 1 || M <= kSplitRows, "many rows are not split", M, deal.splits);
          expect(choose_deal(M, n, 0, false, steps, sms, false).splits == 1, "nothing is split", M, n);
        }
      }
    }
  }
  for (int d : {2872, 3072, 3328}) {
    const int steps = steps_in(4096) + steps_in(d);
    expect(useful(choose_deal(4096, d, 0, false, steps, 132, true), 4096, d) >= 0.95, "tiles of use at 4096 rows", d);
    expect(useful(choose_deal(2048, d, 0, false, steps, 132, true), 2048, d) >= 0.9, "tiles of use at 2048 rows", d);
    for (int n : {12288, 22016}) {
      const Deal deal = choose_deal(4096, n, 0, n == 22016, steps_in(d), 132, false);
      expect(useful(deal, 4096, n) >= 0.95, "tiles of use before the stream", d, n);
    }
    // A few rows keep most of the GPU busy, and take little longer than the weight from memory.
    for (int M : {17, 64, 128, 256, 512}) {
      const Deal deal = choose_deal(M, d, 0, false, steps, 132, true);
      const int64_t across = tiles_across(deal.width, d, 0, false);
      const int64_t items = deal.splits * tiles_in(deal.width, M, d, 0, false);
      const double floor = 128.0 * steps * d / (kMemoryBytes * 132);
      expect(deal.splits > 1 && items >= 33, "few rows are split", M, items);
      if (M <= 64) expect(clocks_of(deal, M, across, steps, 132) < 1.25 * floor, "up to 64 rows wait for memory", M, d);
    }
  }
  const Deal narrow = choose_deal(4096, 3328, 0, false, 116, 132, true);
  expect(narrow.width == 208, "16 tiles of 208 are 3328 columns", narrow.width);
  expect(cells_of({256, 1}, 100, 257) == 2 * 100, "a sum of squares per row and tile", 0);
  expect(cells_of({256, 3}, 100, 257) == 3 * 100 * 512, "the sums of three splits", 0);
}

}  // namespace

int main() {
  shapes<256>();
  shapes<240>();
  shapes<224>();
  shapes<208>();
  shapes<192>();
  shapes<160>();
  shapes<128>();
  transposition();
  sizes();
  deals();
  return 0;
}
