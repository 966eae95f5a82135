// The index arithmetic of attend's kernel: who has which positions, and what meets in the tensor cores.
#include "cuda/attend.h"

#include "expect.h"

using namespace sgf::attend;

namespace {

// Splits have all positions among them, each once, and the last one has the new tokens.
void positions(int start, int tokens, int splits) {
  Cells taken("each position has one split", start + tokens);
  for (int split = 0; split < splits; ++split) {
    const Positions own = positions_of(start, tokens, split, splits);
    for (int position = own.first; position < own.last; ++position) taken.take(position);
    if (split < splits - 1) expect(own.last <= start, "only the last split has new tokens", split, splits);
  }
  taken.expect_all();
}

// B's column n of a product of queries and keys is held by the lanes of group n: it is the position that score_position
// gives C's column n, of which member n / 2 holds value n % 2.
void positions_of_scores() {
  for (int j = 0; j < 2; ++j) {
    for (int n = 0; n < 8; ++n) {
      const int loaded = key_position(n, j), scored = score_position(n / 2, j, n % 2);
      expect(loaded == scored, "a score is of its key", loaded, scored);
    }
  }
}

// A's k and B's k of a product of probabilities and values: register r, half h of a pair, and the same member.
void positions_of_values() {
  Cells taken("each position is added once", kStep);
  for (int member = 0; member < 4; ++member) {
    for (int v = 0; v < 4; ++v) {
      const int weight = score_position(member, v / 2, v % 2), value = value_position(member, v);
      expect(weight == value, "a probability meets its value", weight, value);
      taken.take(value);
    }
  }
  taken.expect_all();
}

// B's column n, held by the lanes of group n, is number 8 n + e of a value in block e; C's column is 2 member + c % 2.
void columns_of_sums() {
  Cells taken("each number of a value has one sum", kGroup);
  for (int member = 0; member < 4; ++member) {
    for (int e = 0; e < kVector; ++e) {
      for (int c = 0; c < 2; ++c) {
        const int n = 2 * member + c, column = sum_column(member, e, c);
        expect(column == kVector * n + e, "a sum is of its column", column, kVector * n + e);
        expect(column == sum_column(member, e, c + 2), "both rows have the same columns", member, e);
        taken.take(column);
      }
    }
  }
  taken.expect_all();
}

void splits() {
  expect(choose_splits(32, 4096, 132) == 4, "32 heads fill an H100 in one wave", choose_splits(32, 4096, 132));
  expect(choose_splits(1000, 4096, 132) == 1, "many items are not split", choose_splits(1000, 4096, 132));
  expect(choose_splits(1, 100, 132) == 1, "a short cache is not split", choose_splits(1, 100, 132));
  for (int64_t items = 1; items < 300; items += 7) {
    for (int64_t room = 1; room < 100000; room = 3 * room + 1) {
      const int chosen = choose_splits(items, room, 132);
      expect(chosen >= 1 && chosen <= kMaxSplits, "splits within bounds", chosen);
    }
  }
}

}  // namespace

int main() {
  for (const int start : {0, 1, 15, 16, 17, 300, 4096}) {
    for (const int tokens : {1, 16, 40}) {
      for (const int splits : {1, 2, 5, 64}) positions(start, tokens, splits);
    }
  }
  positions_of_scores();
  positions_of_values();
  columns_of_sums();
  splits();
  expect(tiles_of(1, 32, 32) == 1 && tiles_of(16, 32, 8) == 4 && tiles_of(3, 71, 1) == 14, "tiles", tiles_of(3, 71, 1));
  expect(padded_size(64, true) == 64 && padded_size(80, true) == 128 && padded_size(16, false) == 256, "sizes", 0);
  return 0;
}
