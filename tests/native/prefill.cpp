// Runs the prefill kernels' data flow on the CPU: the producer and the two warpgroups of both blocks of a cluster take
// turns at random over emulated barriers, copies land late and in any order, the tensor cores read as late as they may,
// and the tile's columns go through the quads as in the kernels; against plain sums. Small integers, 16 bits: equal
// means equal.
#include "cuda/prefill.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

using namespace sgf::prefill;

namespace {

constexpr uint16_t kPoison = 30000;  // beside the matrices: what a stray load would bring in

[[noreturn]] void fail(const char* what, int64_t a, int64_t b) {
  std::printf("%s: %lld %lld\n", what, static_cast<long long>(a), static_cast<long long>(b));
  std::exit(1);
}

uint32_t seed = 1;
uint32_t chance(uint32_t below) { return ((seed = seed * 1664525u + 1013904223u) >> 8) % below; }

// A matrix in rows of a stride that is a multiple of 8, amid poison.
struct Matrix {
  int64_t rows, columns, stride;
  std::vector<uint16_t> cells;

  Matrix(int64_t rows, int64_t columns)
      : rows(rows), columns(columns), stride((columns + 15) / 8 * 8), cells(rows * stride, kPoison) {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < columns; ++c) cells[r * stride + c] = chance(8);
    }
  }
  uint16_t at(int64_t r, int64_t c) const { return cells[r * stride + c]; }
  uint16_t or_zero(int64_t r, int64_t c) const { return r < rows && c < columns ? at(r, c) : 0; }
};

struct Case {
  int M, scaled, unscaled, K, K2;
  bool gated, along_n;
};

// The 128-byte swizzle: bits 4 to 6 of an address are xored with bits 7 to 9.
uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

struct Barrier {
  int count, pending, bytes = 0;
  uint32_t phase = 0;

  explicit Barrier(int count) : count(count), pending(count) {}
  void settle() {
    if (pending < 0) fail("too many arrivals", count, pending);
    if (pending == 0 && bytes == 0) pending = count, phase ^= 1;
  }
  void arrive(int expected = 0) { bytes += expected, --pending, settle(); }
  void complete(int arrived) { bytes -= arrived, settle(); }
  bool done(uint32_t parity) const { return phase != parity; }
};

template <int kWidth>
struct Cluster {
  using S = Shape<kWidth>;

  struct Copy {  // one box on its way into one block
    const Matrix* from;
    Box box;
    int rows, stage, rank;
  };

  // Where a thread of control stands: in which tile, at which step.
  struct Walk {
    int tile;
    int step = 0;
    Ring<S::kStages> ring{};
  };

  struct Consumer {
    Walk walk;
    int multiplying[2] = {};  // stages whose products are under way, oldest first
    int count = 0;
    bool last_along_n[2] = {};
    std::vector<int64_t> sums = std::vector<int64_t>(kGroupRows * kWidth);
  };

  const Case& c;
  const Matrix (&left)[2];
  const Matrix (&right)[2];
  const int rows, across, tiles, clusters;
  const int steps_first, steps;
  std::vector<uint8_t> shared[kRanks];
  std::vector<Barrier> full[kRanks], empty[kRanks];
  std::vector<Copy> copies;
  std::vector<Walk> producers;
  std::vector<Consumer> consumers[kRanks];
  int turns[kRanks] = {};  // passed on and not yet taken

  Cluster(const Case& c, const Matrix (&left)[2], const Matrix (&right)[2], int cluster, int clusters)
      : c(c),
        left(left),
        right(right),
        rows(ceil_div(c.M, kClusterRows)),
        across(tiles_across(kWidth, c.scaled, c.unscaled, c.gated)),
        tiles(rows * across),
        clusters(clusters),
        steps_first(steps_in(c.K)),
        steps(steps_first + steps_in(c.K2)) {
    for (int rank = 0; rank < kRanks; ++rank) {
      shared[rank].assign(S::kStages * S::kStageBytes, 0xff);
      full[rank].assign(S::kStages, Barrier(1));
      empty[rank].assign(S::kStages, Barrier(kReaders));
      producers.push_back({cluster});
      for (int group = 0; group < 2; ++group) consumers[rank].push_back({{cluster}});
    }
  }

  Columns columns(int tile) const {
    return columns_of(kWidth, place_of(tile, rows, across).column, c.scaled, c.unscaled, c.gated);
  }

  void advance(Walk& walk) {
    walk.ring.next();
    if (++walk.step == steps) walk.step = 0, walk.tile += clusters;
  }

  bool produce(int rank) {
    Walk& at = producers[rank];
    if (at.tile >= tiles || !empty[rank][at.ring.stage].done(at.ring.parity ^ 1)) return false;
    full[rank][at.ring.stage].arrive(S::kStageBytes);
    const bool second = at.step >= steps_first;
    const int k = (second ? at.step - steps_first : at.step) * kStep;
    const auto copy = [&](const Matrix& from, const Box& box, int box_rows) {
      for (int to = 0; to < kRanks; ++to) {
        if (to == rank || box.both) copies.push_back({&from, box, box_rows, at.ring.stage, to});
      }
    };
    copy(left[second], left_box(k, place_of(at.tile, rows, across).row, rank), kTileRows);
    if (second && c.along_n) {
      for (int block = 0; block < kWidth / kBlock; ++block) {
        copy(right[1], right_box_along_n(block, k, columns(at.tile), rank), kBoxStep);
      }
    } else {
      copy(right[second], right_box_along_k(kWidth, k, columns(at.tile), rank), kWidth / 2);
    }
    advance(at);
    return true;
  }

  bool land() {
    if (copies.empty()) return false;
    const auto which = copies.begin() + chance(static_cast<uint32_t>(copies.size()));
    const Copy copy = *which;
    copies.erase(which);
    const uint32_t to = copy.stage * S::kStageBytes + copy.box.to;
    if (to % 1024 != 0) fail("a box must start at a core matrix", to, 1024);
    for (int r = 0; r < copy.rows; ++r) {
      for (int e = 0; e < kRowBytes / 2; ++e) {
        const uint16_t value = copy.from->or_zero(copy.box.y + r, copy.box.x + e);
        std::memcpy(&shared[copy.rank][swizzled(to + r * kRowBytes + e * 2)], &value, 2);
      }
    }
    full[copy.rank][copy.stage].complete(copy.rows * kRowBytes);
    return true;
  }

  // Element mn of k of an operand, as the tensor core finds it by its descriptor.
  int64_t read(int rank, uint64_t descriptor, bool along_n, int mn, int k) const {
    if (descriptor >> 62 != 1) fail("swizzle mode", descriptor >> 62, 1);
    const auto field = [&](int bit) { return static_cast<uint32_t>(descriptor >> bit & 0x3fff) << 4; };
    const uint32_t start = field(0), block = field(16), eight = field(32);
    const uint32_t address = along_n ? start + mn / 64 * block + k / 8 * eight + k % 8 * kRowBytes + mn % 64 * 2
                                     : start + mn / 8 * eight + mn % 8 * kRowBytes + k * 2;
    uint16_t value;
    std::memcpy(&value, &shared[rank][swizzled(address)], 2);
    return value;
  }

  // The oldest step under way ends: its operands are read now, and its stage is free.
  void end_oldest(int rank, int group) {
    Consumer& me = consumers[rank][group];
    const int stage = me.multiplying[0];
    const bool along_n = me.last_along_n[0];
    for (int sixteenth = 0; sixteenth < kStep / 16; ++sixteenth) {
      const uint64_t a = left_operand(stage * S::kStageBytes, group, sixteenth);
      const uint64_t b = right_operand(stage * S::kStageBytes, sixteenth, along_n);
      for (int k = 0; k < 16; ++k) {
        int64_t of_right[kWidth];
        for (int n = 0; n < kWidth; ++n) of_right[n] = read(rank, b, along_n, n, k);
        for (int m = 0; m < kGroupRows; ++m) {
          const int64_t of_left = read(rank, a, false, m, k);
          int64_t* row = &me.sums[m * kWidth];
          for (int n = 0; of_left != 0 && n < kWidth; ++n) row[n] += of_left * of_right[n];
        }
      }
    }
    for (int warp = 0; warp < 4; ++warp) {
      for (int to = 0; to < kRanks; ++to) empty[to][stage].arrive();
    }
    me.multiplying[0] = me.multiplying[1], me.last_along_n[0] = me.last_along_n[1], --me.count;
  }

  template <class Finish>
  bool consume(int rank, int group, Finish finish) {
    Consumer& me = consumers[rank][group];
    if (me.walk.tile >= tiles && me.count == 0) return false;
    if (me.count == 2) return end_oldest(rank, group), true;
    if (me.walk.step == 0 && me.count == 1) {  // the tile's last step has begun
      end_oldest(rank, group);
      const int tile = me.walk.tile - clusters;
      finish(place_of(tile, rows, across), columns(tile), rank, group, me.sums);
      me.sums.assign(kGroupRows * kWidth, 0);
      return true;
    }
    const auto& ring = me.walk.ring;
    const int lead = lead_of<kWidth>(steps);
    const bool turn = group == 1 && me.walk.step == 0 && lead >= 0;
    if ((turn && turns[rank] == 0) || !full[rank][ring.stage].done(ring.parity)) return false;
    if (turn) turns[rank] = 0;
    me.multiplying[me.count] = ring.stage;
    me.last_along_n[me.count++] = c.along_n && me.walk.step >= steps_first;
    if (group == 0 && me.walk.step == lead && turns[rank]++ != 0) fail("a turn was passed on twice", rank, lead);
    advance(me.walk);
    return true;
  }

  template <class Finish>
  void run(Finish finish) {
    int idle = 0;
    while (idle < 400) {
      const uint32_t pick = chance(9), rank = pick % kRanks;
      const bool moved = pick < 2 ? produce(rank) : pick < 6 ? consume(rank, pick < 4 ? 0 : 1, finish) : land();
      idle = moved ? 0 : idle + 1;
    }
    if (!copies.empty()) fail("copies on their way at the end", copies.size(), 0);
    for (int rank = 0; rank < kRanks; ++rank) {
      if (producers[rank].tile < tiles) fail("the producer is stuck at tile", producers[rank].tile, tiles);
      for (int group = 0; group < 2; ++group) {
        const Consumer& me = consumers[rank][group];
        if (me.walk.tile < tiles || me.count > 0) fail("a warpgroup is stuck at tile", me.walk.tile, group);
      }
    }
  }
};

using Quads = uint32_t[32][4];  // of a warp's lanes

void transpose(Quads& words) {
  for (int bit = 1; bit <= 2; ++bit) {
    for (int i = 0; i < 2; ++i) {
      uint32_t sent[32];
      for (int lane = 0; lane < 32; ++lane) sent[lane] = outgoing(words[lane], lane % 4, bit, i);
      for (int lane = 0; lane < 32; ++lane) incoming(words[lane], lane % 4, bit, i, sent[lane ^ bit]);
    }
  }
}

void load_run(const uint16_t* from, int count, uint32_t (&words)[4]) {
  for (uint32_t& word : words) word = 0;
  for (int e = 0; e < count; ++e) words[e / 2] |= static_cast<uint32_t>(from[e]) << (16 * (e % 2));
}

uint16_t element(uint32_t pair, int e) { return static_cast<uint16_t>(pair >> (16 * e)); }

int64_t scale_of(int64_t m) { return m % 3 + 1; }

// The kernels' epilogues with integers for what they compute: scale and bias, a gate that stands for 3 gate + up, the
// residual, and the sums of squares. 16 bits wrap around.
template <int kWidth>
void simulate(const Case& c, int clusters) {
  using S = Shape<kWidth>;
  const int64_t n = c.scaled + c.unscaled, stored = (c.gated ? c.scaled / 2 : c.scaled) + c.unscaled;
  const bool along_n = c.along_n;
  const Matrix left[2] = {Matrix(c.M, c.K), Matrix(c.M, c.K2)};
  const Matrix right[2] = {Matrix(n, c.K), along_n ? Matrix(c.K2, n) : Matrix(n, c.K2)};
  const Matrix bias(1, c.scaled), residual(c.M, stored);
  std::vector<uint16_t> y(c.M * stored);
  std::vector<int> times(c.M * stored);
  const int64_t across = tiles_across(kWidth, c.scaled, c.unscaled, c.gated);
  std::vector<int64_t> squares(across * c.M, -1);

  const auto finish = [&](Place place, const Columns& columns, int rank, int group, const std::vector<int64_t>& tile) {
    for (int warp = 0; warp < 4; ++warp) {
      int64_t square[32][2] = {};
      const bool paired = c.gated && columns.scaled;
      for (int chunk = 0; chunk < (paired ? S::kChunks / 2 : S::kChunks); ++chunk) {
        Quads biases[2] = {}, words[2];
        Run runs[32];
        for (int lane = 0; lane < 32; ++lane) {
          runs[lane] = run_of(kWidth, columns, chunk, lane % 4);
          for (int half = 0; half <= paired; ++half) {
            const Run run = run_of(kWidth, columns, chunk + half * S::kChunks / 2, lane % 4);
            if (columns.scaled) load_run(&bias.cells[run.count > 0 ? run.row : 0], run.count, biases[half][lane]);
          }
        }
        transpose(biases[0]);
        transpose(biases[1]);
        for (int below = 0; below < 2; ++below) {
          const auto row_of = [&](int lane) {
            return place.row * kClusterRows + rank * kTileRows + group * kGroupRows +
                   sgf::hopper::accumulator_row(warp * 32 + lane, 0) + 8 * below;
          };
          for (int lane = 0; lane < 32; ++lane) {
            const int64_t m = row_of(lane);
            const int count = m < c.M ? runs[lane].count : 0;
            load_run(&residual.cells[count > 0 ? m * residual.stride + runs[lane].column : 0], count,
                     words[below][lane]);
          }
          transpose(words[below]);
          for (int lane = 0; lane < 32; ++lane) {
            const int thread = warp * 32 + lane;
            for (int block = 0; block < 4; ++block) {
              uint32_t pair = 0;
              for (int e = 0; e < 2; ++e) {
                const auto sum_of = [&](int half) {
                  const int at = accumulator_of(chunk + half * S::kChunks / 2, block, below) + e;
                  if (at >= S::kAccumulators) fail("accumulator", at, S::kAccumulators);
                  const int64_t sum = tile[sgf::hopper::accumulator_row(thread, at) * kWidth +
                                           sgf::hopper::accumulator_column(thread, at)];
                  const int64_t scaled = sum * scale_of(row_of(lane)) + element(biases[half][lane][block], e);
                  return columns.scaled ? scaled : sum;
                };
                const int64_t value = paired ? 3 * sum_of(0) + sum_of(1) : sum_of(0);
                const auto total = static_cast<uint16_t>(value + element(words[below][lane][block], e));
                pair |= static_cast<uint32_t>(total) << (16 * e);
              }
              words[below][lane][block] = pair;
            }
          }
          transpose(words[below]);
          for (int lane = 0; lane < 32; ++lane) {
            const int64_t m = row_of(lane);
            for (int e = 0; e < runs[lane].count; ++e) {
              const int64_t value = element(words[below][lane][e / 2], e % 2);
              square[lane][below] += value * value;
              if (m >= c.M) continue;
              y[m * stored + runs[lane].column + e] = static_cast<uint16_t>(value);
              ++times[m * stored + runs[lane].column + e];
            }
          }
        }
      }
      for (int lane = 0; lane < 32; lane += 4) {
        for (int below = 0; below < 2; ++below) {
          const int64_t m = place.row * kClusterRows + rank * kTileRows + group * kGroupRows +
                            sgf::hopper::accumulator_row(warp * 32 + lane, 0) + 8 * below;
          if (m >= c.M) continue;
          int64_t& cell = squares[place.column * c.M + m];
          if (cell != -1) fail("squares were written twice", m, place.column);
          cell = square[lane][below] + square[lane + 1][below] + square[lane + 2][below] + square[lane + 3][below];
        }
      }
    }
  };

  for (int cluster = 0; cluster < clusters; ++cluster) {
    Cluster<kWidth>(c, left, right, cluster, clusters).run(finish);
  }

  for (int64_t m = 0; m < c.M; ++m) {
    std::vector<int64_t> product(n);
    for (int64_t row = 0; row < n; ++row) {
      for (int64_t k = 0; k < c.K; ++k) product[row] += left[0].at(m, k) * right[0].at(row, k);
      for (int64_t k = 0; k < c.K2; ++k) {
        product[row] += left[1].at(m, k) * (along_n ? right[1].at(k, row) : right[1].at(row, k));
      }
      if (row < c.scaled) product[row] = product[row] * scale_of(m) + bias.at(0, row);
    }
    int64_t square = 0;
    for (int64_t column = 0; column < stored; ++column) {
      const int64_t gates = c.gated ? c.scaled / 2 : 0;
      const int64_t value =
          column < gates ? 3 * product[column] + product[column + gates] : product[column + (c.gated ? gates : 0)];
      const auto expected = static_cast<uint16_t>(value + residual.at(m, column));
      if (times[m * stored + column] != 1) fail("times that y was stored", times[m * stored + column], column);
      if (y[m * stored + column] != expected) fail("y differs at", m, column);
      square += static_cast<int64_t>(expected) * expected;
    }
    for (int64_t tile = 0; tile < across; ++tile) square -= squares[tile * c.M + m];
    if (square != 0) fail("sum of squares differs in row", m, square);
  }
}

void schedules() {
  for (int rows : {1, 2, 7, 8, 9, 16, 21}) {
    for (int across : {1, 3, 12}) {
      std::vector<int> seen(rows * across);
      for (int tile = 0; tile < rows * across; ++tile) {
        const Place place = place_of(tile, rows, across);
        if (place.row >= rows || place.column >= across) fail("place", place.row, place.column);
        if (seen[place.row * across + place.column]++ != 0) fail("a tile was dealt out twice", tile, rows);
      }
    }
  }
  for (int width : kWidths) {
    for (int n : {1, 193, 2872}) {
      if (tiles_across(width, n, 0, false) * 1000 > squares_cells(1000, n)) fail("workspace", width, n);
    }
  }
  // 2872 columns: 256 leaves a third of the second wave idle at M = 2048.
  if (choose_width(2048, 2872, 0, false, 64, 132) != 192) fail("width for", 2048, 2872);
  if (choose_width(4096, 12288, 0, false, 48, 132) != 256) fail("width for", 4096, 12288);
  if (choose_width(128, 2872, 0, false, 64, 132) != 128) fail("width for", 128, 2872);
  if (choose_width(17, 1, 0, false, 1, 1) == 0) fail("width for", 17, 1);
}

template <int kWidth>
void shapes() {
  using S = Shape<kWidth>;
  static_assert(S::kStages >= 4 && S::kLead >= 1 && S::kLead < S::kStages - 1, "room for a lead and for copies");
  static_assert(S::kSharedBytes + 2 * S::kStages * 8 <= kSharedLimit, "shared memory of a block");
  static_assert(S::kStageBytes % 1024 == 0 && kLeftBytes % 1024 == 0 && S::kHalf * kRowBytes % 1024 == 0, "alignment");
  static_assert(S::kHalf % kChunk == 0, "no chunk has columns of both halves");
  //              M    scaled       unscaled  K    K2   gated along_n
  simulate<kWidth>({130, kWidth + 9, 0, 75, 0, false, false}, 1);
  simulate<kWidth>({300, 2 * (kWidth / 2 + 33), 21, 200, 0, true, false}, 2);
  simulate<kWidth>({17, 0, 40, 8, 0, false, false}, 1);
  simulate<kWidth>({257, 2 * kWidth + 100, 0, 65, 131, false, true}, 1);
  simulate<kWidth>({140, kWidth - 3, 0, 130, 11, false, false}, 1);
  simulate<kWidth>({40, 33, 0, 450, 300, false, true}, 1);
  simulate<kWidth>({140, 50, 0, 40, 500, false, true}, 1);
  simulate<kWidth>({600, 3 * kWidth, 0, 70, 0, false, false}, 1);
}

}  // namespace

int main() {
  shapes<256>();
  shapes<192>();
  shapes<128>();
  schedules();
  return 0;
}
