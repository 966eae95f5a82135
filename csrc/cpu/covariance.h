// acc += X^T X for tall X [N, D]: a symmetric rank-N update (SYRK) of which one triangle is computed.
//
//            panels j
//          0  1  2  3  ...
//       0  D
//       1  x  D             x: computed
//    i  2  x  x  D          D: computed, on the diagonal
//       3  x  x  x  D
//
// The columns of x are cut into panels of 48, the rows into blocks of 128 words (a word: one fp32 number, or the bf16
// numbers of two rows). Packing writes block after block, in it panel after panel, in it row after row of 48 words: one
// layout for both sides of the product. It converts to fp32, scales the rows and skips those that do not count.
//
// A thread owns whole tiles of up to 3 x 3 pairs of panels with i >= j, about equally much work per thread. For each
// block of rows and each of the pairs the micro-kernel keeps kRows x kColumns sums in registers, 8 x 48 with 32 vector
// registers of 16 lanes: in one step of k it loads 3 vectors of panel j, broadcasts 8 words of panel i, and does 24
// multiply-adds. After a block its sums go to fp32 sums in the L2 cache, and after the last block those go to acc,
// lower triangle and mirror image at once. So a sum is a chain of 128 additions, then of 16, then of one per call in
// acc. The order never depends on the number of threads.
//
// FLOPs: N D (D + 48). Bytes: x once; the packed words written once and read D / 144 times, from the caches; the lower
// triangle of acc read once and acc written once for every 2048 words of rows. The floor is the arithmetic: on two Zen
// 4 cores at 3.66 GHz 234 GFLOP/s in fp32 and 468 by bf16 pairs. Reached there with N = 2048, D = 4096 and acc in fp64,
// as the op, 191 (82 %) and 376 (80 %). The micro-kernel alone runs at the floor; a tenth of the time goes into acc,
// whose rows lie a power of two apart so that no cache keeps them until they are due.
#pragma once

#include <cstdint>
#include <cstring>

#include "arithmetic.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"
#include "slicegpt_fast.h"

namespace sgf {

// A call of sgf_covariance().
struct Covariance {
  sgf_matrix acc, x;
  const float* row_scale;  // or null
  const int64_t* rows;     // of x that count, or null: all
  int64_t N, D;            // rows that count, columns
  int acc_dtype, dtype, threads;
  float* workspace;
};

namespace {

constexpr int64_t kPanel = 48;    // columns; a multiple of kRows and kColumns of every instruction set
constexpr int64_t kBlock = 128;   // words of a column
constexpr int64_t kChunk = 2048;  // words of a column that are packed at a time
constexpr int64_t kTile = 3;      // panels

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRows = 8, kVectors = 3;  // 32 vector registers
#else
constexpr int kRows = 6, kVectors = 2;  // 16
#endif
constexpr int64_t kColumns = kVectors * kLanes;

constexpr int64_t kLine = 16;  // words of a cache line

inline void fetch(const float* line) { __builtin_prefetch(line, 0, 2); }  // into the L2 cache

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// The first of the `count` items that belong to `part` of `parts`.
inline int64_t share(int64_t count, int64_t part, int64_t parts) { return count * part / parts; }

// What a word holds. Single: the number of one row. Pair: those of two.

struct Single {
  static constexpr int64_t kRowsPerWord = 1;

  static Floats multiply_add(Floats sums, Words a, Words b) { return bit_cast<Floats>(a) * bit_cast<Floats>(b) + sums; }
};

#if defined(__AVX512BF16__)
struct Pair {
  static constexpr int64_t kRowsPerWord = 2;

  static Floats multiply_add(Floats sums, Words a, Words b) {
    return dot(sums, bit_cast<Pairs>(a), bit_cast<Pairs>(b));
  }
};
#endif

// Packing

struct Packed {
  float* words;    // [blocks][panels][kBlock][kPanel]
  int64_t panels;  // of x
  int64_t count;   // words of a column in this chunk

  float* panel(int64_t block, int64_t panel) const { return words + (block * panels + panel) * kBlock * kPanel; }
  int64_t blocks() const { return ceil_div(count, kBlock); }
  int64_t depth(int64_t block) const { return smaller(kBlock, count - block * kBlock); }
};

// kLanes numbers: the first `count` of them are read.
template <class T>
inline Floats load_up_to(const T* from, int64_t count) {
  return count >= kLanes ? load(from) : count > 0 ? load(from, count) : Floats{};
}

template <class T>
inline const T* row_of(const Covariance& call, int64_t n) {
  return static_cast<const T*>(call.x.data) + (call.rows == nullptr ? n : call.rows[n]) * call.x.row_stride;
}

inline float scale_of(const Covariance& call, int64_t n) {
  return call.row_scale == nullptr ? 1.0f : call.row_scale[call.rows == nullptr ? n : call.rows[n]];
}

// Writes the word of the rows from n on, in the columns of the panels [first, last), to row `k` of the block.
template <class T>
inline void pack_row(const Covariance& call, Single, int64_t n, float* to, int64_t first, int64_t last) {
  const T* row = row_of<T>(call, n);
  const float scale = scale_of(call, n);
  for (int64_t panel = first; panel < last; ++panel, to += kBlock * kPanel) {
    for (int64_t c = 0; c < kPanel; c += kLanes) {
      const int64_t column = panel * kPanel + c;
      store(to + c, load_up_to(row + column, call.D - column) * splat(scale));
    }
  }
}

#if defined(__AVX512BF16__)
template <class T>
inline void pack_row(const Covariance& call, Pair, int64_t n, float* to, int64_t first, int64_t last) {
  const T* even = row_of<T>(call, n);
  const T* odd = n + 1 < call.N ? row_of<T>(call, n + 1) : nullptr;
  for (int64_t panel = first; panel < last; ++panel, to += kBlock * kPanel) {
    for (int64_t c = 0; c < kPanel; c += kLanes) {
      const int64_t column = panel * kPanel + c, count = call.D - column;
      const Words low = bit_cast<Words>(load_up_to(even + column, count)) >> 16;
      const Words high = odd == nullptr ? Words{} : bit_cast<Words>(load_up_to(odd + column, count));
      store(to + c, bit_cast<Floats>(high | low));
    }
  }
}
#endif

// Packs the chunk whose first row is n.
template <class T, class Word>
void pack(const Covariance& call, const Packed& packed, int64_t n, int64_t part) {
  const int64_t items = packed.blocks() * packed.panels;
  const int64_t end = share(items, part + 1, call.threads);
  for (int64_t item = share(items, part, call.threads); item < end;) {
    const int64_t block = item / packed.panels, first = item % packed.panels;
    const int64_t last = smaller(packed.panels, first + end - item);
    for (int64_t k = 0; k < packed.depth(block); ++k) {
      pack_row<T>(call, Word{}, n + (block * kBlock + k) * Word::kRowsPerWord, packed.panel(block, first) + k * kPanel,
                  first, last);
    }
    item += last - first;
  }
}

// Multiplying

// sums[kPanel][kPanel] += A^T B of two packed panels, rows [0, height). Calls step(0), step(1), ... as it goes.
template <class Word, class Step>
inline void multiply_panels(float* sums, const float* a, const float* b, int64_t depth, int64_t height, Step&& step) {
  int64_t steps = 0;
  for (int64_t i = 0; i < height; i += kRows) {
    for (int64_t j = 0; j < kPanel; j += kColumns) {
      Floats registers[kRows][kVectors] = {};
      for (int64_t k = 0; k < depth; ++k) {
        step(steps++);
        Words right[kVectors];
        for (int v = 0; v < kVectors; ++v) right[v] = bit_cast<Words>(load(b + k * kPanel + j + v * kLanes));
        for (int r = 0; r < kRows; ++r) {
          const Words left = bit_cast<Words>(splat(a[k * kPanel + i + r]));
          for (int v = 0; v < kVectors; ++v) registers[r][v] = Word::multiply_add(registers[r][v], left, right[v]);
        }
      }
      for (int r = 0; r < kRows; ++r) {
        for (int v = 0; v < kVectors; ++v) {
          float* to = sums + (i + r) * kPanel + j + v * kLanes;
          store(to, load(to) + registers[r][v]);
        }
      }
    }
  }
}

// Adds the sums of panels i and j to acc and mirrors them. On the diagonal only the lower triangle of acc is read.
template <class Master>
void flush(const Covariance& call, const float* sums, int64_t i, int64_t j) {
  const int64_t height = smaller(kPanel, call.D - i * kPanel), width = smaller(kPanel, call.D - j * kPanel);
  const int64_t stride = call.acc.row_stride;
  Master* lower = static_cast<Master*>(call.acc.data) + i * kPanel * stride + j * kPanel;
  Master* upper = static_cast<Master*>(call.acc.data) + j * kPanel * stride + i * kPanel;
  Master total[kPanel][kPanel];
  for (int64_t r = 0; r < height; ++r) {
    const int64_t known = i == j ? r + 1 : width;
    for (int64_t c = 0; c < known; ++c) {
      total[r][c] = lower[r * stride + c] + static_cast<Master>(sums[r * kPanel + c]);
      lower[r * stride + c] = total[r][c];
    }
  }
  for (int64_t c = 0; c < width; ++c) {
    for (int64_t r = i == j ? c : 0; r < height; ++r) upper[c * stride + r] = total[r][c];
  }
}

// One tile: the pairs of the panels [i, i_end) and [j, j_end) on or below the diagonal. While a pair is multiplied, the
// panels of the next one are fetched into the cache, one line a step.
template <class Master, class Word>
void compute_tile(const Covariance& call, const Packed& packed, float* sums, int64_t i, int64_t i_end, int64_t j,
                  int64_t j_end) {
  int64_t rows[kTile * kTile], columns[kTile * kTile], pairs = 0;
  for (int64_t row = i; row < i_end; ++row) {
    for (int64_t column = j; column < smaller(j_end, row + 1); ++column, ++pairs) {
      rows[pairs] = row;
      columns[pairs] = column;
    }
  }
  std::memset(sums, 0, sizeof(float) * pairs * kPanel * kPanel);
  for (int64_t at = 0, end = packed.blocks() * pairs; at < end; ++at) {
    const int64_t block = at / pairs, pair = at % pairs, next = smaller(at + 1, end - 1);
    const float* next_a = packed.panel(next / pairs, rows[next % pairs]);
    const float* next_b = packed.panel(next / pairs, columns[next % pairs]);
    multiply_panels<Word>(sums + pair * kPanel * kPanel, packed.panel(block, rows[pair]),
                          packed.panel(block, columns[pair]), packed.depth(block),
                          smaller(kPanel, call.D - rows[pair] * kPanel), [&](int64_t step) {
                            const int64_t offset = step * kLine, size = kBlock * kPanel;
                            if (offset < 2 * size) fetch(offset < size ? next_a + offset : next_b + offset - size);
                          });
  }
  for (int64_t pair = 0; pair < pairs; ++pair) {
    flush<Master>(call, sums + pair * kPanel * kPanel, rows[pair], columns[pair]);
  }
}

// The tiles of one part: in the triangle's order, tile after tile of about the same total of pairs.
template <class Master, class Word>
void compute(const Covariance& call, const Packed& packed, int64_t part, float* sums) {
  const int64_t panels = packed.panels, pairs = panels * (panels + 1) / 2;
  const int64_t side = panels < 8 * kTile ? 1 : kTile;
  int64_t before = 0;
  for (int64_t i = 0; i < panels; i += side) {
    for (int64_t j = 0; j <= i; j += side) {
      const int64_t i_end = smaller(panels, i + side), height = i_end - i;
      if (before * call.threads / pairs == part) {
        compute_tile<Master, Word>(call, packed, sums, i, i_end, j, smaller(panels, j + side));
      }
      before += i == j ? height * (height + 1) / 2 : height * side;
    }
  }
}

template <class T, class Master, class Word>
void run(const Covariance& call) {
  const int64_t panels = ceil_div(call.D, kPanel), words = ceil_div(call.N, Word::kRowsPerWord);
  float* sums = call.workspace;  // [threads][kTile^2][kPanel][kPanel], then the packed words
  constexpr int64_t kSums = kTile * kTile * kPanel * kPanel;
  for (int64_t first = 0; first < words; first += kChunk) {
    const Packed packed{sums + call.threads * kSums, panels, smaller(kChunk, words - first)};
    parallel(call.threads, [&](int part) { pack<T, Word>(call, packed, first * Word::kRowsPerWord, part); });
    parallel(call.threads, [&](int part) { compute<Master, Word>(call, packed, part, sums + part * kSums); });
  }
}

template <class T, class Word = Single>
void run(const Covariance& call) {
  if (call.acc_dtype == SGF_FLOAT64) {
    run<T, double, Word>(call);
  } else {
    run<T, float, Word>(call);
  }
}

// Chooses the word: exact pairs where the machine multiplies them and no scaling rounds them, fp32 otherwise.
void run(const Covariance& call) {
  if (call.dtype == SGF_FLOAT32) {
    run<float>(call);
  } else if (call.dtype == SGF_FLOAT16) {
    run<Float16>(call);
  } else {
#if defined(__AVX512BF16__)
    if (call.row_scale == nullptr) return run<BFloat16, Pair>(call);
#endif
    run<BFloat16>(call);
  }
}

}  // namespace
}  // namespace sgf
