// What the matmuls and the attention of a CPU share: rows of fp32, fp16 or bf16 times rows, and sums of squares.
//
// The left side, `a`, is small and read often: it is laid out once as the products take it (its `Kept` form). The right
// side, `w`, is a weight or a cache, read once as it lies.
#pragma once

#include "arithmetic.h"
#include "cpu/simd.h"

namespace sgf {
namespace {

// Numbers up to a whole step of every instruction set.
constexpr int64_t padded(int64_t size) { return ceil_div(size, 32) * 32; }

// kStep numbers of a row, as the dot products take them: from a weight, or from `a` where it is `Kept`.
template <class T>
struct Operand;

template <>
struct Operand<float> {
  static constexpr int kStep = kLanes;
  using Kept = float;
  Floats x;

  static Operand of(const float* from) { return {load(from)}; }
  static Operand of(const float* from, int64_t count) { return {load(from, count)}; }
  static Operand of_kept(const float* from) { return of(from); }
  void keep(float* to) const { store(to, x); }
  Floats times(Operand a, Floats sums) const { return sums + x * a.x; }
};

template <>
struct Operand<Float16> {
  static constexpr int kStep = 2 * kLanes;
  using Kept = float;
  Floats low, high;

  static Operand of(const Float16* from) { return {load(from), load(from + kLanes)}; }
  static Operand of(const Float16* from, int64_t count) {
    return {load(from, count), load(from + kLanes, count - kLanes)};
  }
  static Operand of_kept(const float* from) { return {load(from), load(from + kLanes)}; }
  void keep(float* to) const {
    store(to, low);
    store(to + kLanes, high);
  }
  Floats times(Operand a, Floats sums) const { return sums + low * a.low + high * a.high; }
};

template <>
struct Operand<BFloat16> {
  static constexpr int kStep = 2 * kLanes;
#if defined(__AVX512BF16__)
  using Kept = BFloat16;
  Pairs x;

  static Operand of(const BFloat16* from) { return {load_pairs(from)}; }
  static Operand of(const BFloat16* from, int64_t count) { return {load_pairs(from, count)}; }
  static Operand of_kept(const BFloat16* from) { return {load_pairs(from)}; }
  void keep(BFloat16* to) const { std::memcpy(to, &x, sizeof x); }
  Floats times(Operand a, Floats sums) const { return dot(sums, x, a.x); }
#else
  using Kept = float;
  Floats even, odd;

  static Operand of(const BFloat16* from) {
    Words pairs;
    std::memcpy(&pairs, from, sizeof pairs);
    return {bit_cast<Floats>(pairs << 16), bit_cast<Floats>(pairs & 0xffff0000)};
  }
  static Operand of(const BFloat16* from, int64_t count) {
    BFloat16 numbers[kStep] = {};
    std::memcpy(numbers, from, static_cast<std::size_t>(count) * sizeof(BFloat16));
    return of(numbers);
  }
  static Operand of_kept(const float* from) { return {load(from), load(from + kLanes)}; }
  void keep(float* to) const {
    store(to, even);
    store(to + kLanes, odd);
  }
  Floats times(Operand a, Floats sums) const { return sums + even * a.even + odd * a.odd; }
#endif
};

// What the next tile reads, to L2: the machine's own prefetchers, which start anew with every row, reach half the
// bandwidth. Past the end of the weight there is nothing to fear from it.
inline void prefetch(const void* address) { __builtin_prefetch(address, 0, 2); }

// A tile's partial sums fit the vector registers: 32 of them with AVX-512, else 16.
constexpr int kTileRows = kLanes == 16 ? 6 : 3;  // with 4 rows of w
constexpr int kFewRows = kLanes == 16 ? 4 : 1;   // with 8, which keeps more of w on its way

// sums[m, r] += a[m] . w[r] for `rows` rows of a and `columns` rows of w.
template <int rows, int columns, class T, class Kept = typename Operand<T>::Kept>
inline void dot_tile(const Kept* a, int64_t a_stride, const T* w, int64_t w_stride, int64_t K, float* sums,
                     int64_t sums_stride) {
  using Step = Operand<T>;
  Floats partial[rows][columns] = {};
  const auto add = [&](int64_t k, auto... count) {
    Step x[columns];
#pragma GCC unroll 8
    for (int r = 0; r < columns; ++r) {
      x[r] = Step::of(w + r * w_stride + k, count...);
      prefetch(w + (r + columns) * w_stride + k);
    }
#pragma GCC unroll 8
    for (int m = 0; m < rows; ++m) {
      const Step y = Step::of_kept(a + m * a_stride + k);
#pragma GCC unroll 8
      for (int r = 0; r < columns; ++r) partial[m][r] = x[r].times(y, partial[m][r]);
    }
  };
  int64_t k = 0;
  for (; k + Step::kStep <= K; k += Step::kStep) add(k);
  if (k < K) add(k, K - k);
  for (int m = 0; m < rows; ++m) {
    float* const to = sums + m * sums_stride;
    if constexpr (columns > 1 && columns <= kLanes) {
      store(to, load(to, columns) + sums_of<columns>(partial[m]), columns);
    } else {
      for (int r = 0; r < columns; ++r) to[r] += sum(partial[m][r]);
    }
  }
}

// The same for M rows of a, `rows` at a time and then fewer. `w` is a pointer, or what else a dot_tile takes for rows
// of a weight: one may be added to it as often as there are rows.
template <int rows, int columns, class Kept, class Rows>
inline void dot_tiles(int64_t M, const Kept* a, int64_t a_stride, Rows w, int64_t w_stride, int64_t K, float* sums,
                      int64_t sums_stride) {
  for (; M >= rows; M -= rows, a += rows * a_stride, sums += rows * sums_stride) {
    dot_tile<rows, columns>(a, a_stride, w, w_stride, K, sums, sums_stride);
  }
  if constexpr (rows > 1) dot_tiles<rows - 1, columns>(M, a, a_stride, w, w_stride, K, sums, sums_stride);
}

// sums[m, j] += a[m, 0] * w[0, j] + ... for `steps` rows of w, which lie w_stride apart.
template <int steps, class T>
inline void add_steps(int64_t M, const float* a, int64_t a_stride, const T* w, int64_t w_stride, int64_t n, float* sums,
                      int64_t sums_stride) {
  const auto add = [&](int64_t j, auto... count) {
    Floats x[steps];
#pragma GCC unroll 8
    for (int i = 0; i < steps; ++i) {
      x[i] = load(w + i * w_stride + j, count...);
      prefetch(w + (i + steps) * w_stride + j);
    }
    for (int64_t m = 0; m < M; ++m) {
      Floats total = {};  // of these steps first: the more numbers a sum already holds, the coarser it takes the next
#pragma GCC unroll 8
      for (int i = 0; i < steps; ++i) total += x[i] * splat(a[m * a_stride + i]);
      float* const to = sums + m * sums_stride + j;
      store(to, load(to, count...) + total, count...);  // the next columns are another thread's
    }
  };
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) add(j);
  if (j < n) add(j, n - j);
}

// K numbers in the form that the products take, with zeros up to a whole step.
template <class T>
inline void keep_row(const T* from, int64_t K, typename Operand<T>::Kept* to) {
  using Step = Operand<T>;
  int64_t k = 0;
  for (; k + Step::kStep <= K; k += Step::kStep) Step::of(from + k).keep(to + k);
  if (k < K) Step::of(from + k, K - k).keep(to + k);
}

// sums[m, r] += a[m] . w[r] for M rows of a and rows begin ... end of w.
template <int rows, int columns, class Kept, class Rows>
inline int64_t dot_rows(int64_t M, const Kept* a, int64_t a_stride, Rows w, int64_t w_stride, int64_t K, float* sums,
                        int64_t sums_stride, int64_t begin, int64_t end) {
  for (; begin + columns <= end; begin += columns) {
    dot_tiles<rows, columns>(M, a, a_stride, w + begin * w_stride, w_stride, K, sums + begin, sums_stride);
  }
  return begin;
}

template <class Kept, class Rows>
inline void dot_rows(int64_t M, const Kept* a, int64_t a_stride, Rows w, int64_t w_stride, int64_t K, float* sums,
                     int64_t sums_stride, int64_t begin, int64_t end) {
  if (M <= kFewRows) {
    begin = dot_rows<kFewRows, 8>(M, a, a_stride, w, w_stride, K, sums, sums_stride, begin, end);
  } else {
    begin = dot_rows<kTileRows, 4>(M, a, a_stride, w, w_stride, K, sums, sums_stride, begin, end);
  }
  dot_rows<kTileRows, 1>(M, a, a_stride, w, w_stride, K, sums, sums_stride, begin, end);
}

// sums[m, j] += a[m, 0] * w[0, j] + ... for K rows of w.
template <class T>
inline void add_rows(int64_t M, const float* a, int64_t a_stride, const T* w, int64_t w_stride, int64_t K, int64_t n,
                     float* sums, int64_t sums_stride) {
  int64_t k = 0;
  for (; k + 8 <= K; k += 8, w += 8 * w_stride) {
    add_steps<8>(M, a + k, a_stride, w, w_stride, n, sums, sums_stride);
  }
  for (; k < K; ++k, w += w_stride) add_steps<1>(M, a + k, a_stride, w, w_stride, n, sums, sums_stride);
}

template <class T>
inline float sum_of_squares(const T* x, int64_t n) {
  Floats squares[4] = {};
  int64_t j = 0;
  for (; j + 4 * kLanes <= n; j += 4 * kLanes) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const Floats value = load(x + j + i * kLanes);
      squares[i] += value * value;
    }
  }
  for (; j < n; j += kLanes) {
    const Floats value = j + kLanes <= n ? load(x + j) : load(x + j, n - j);
    squares[0] += value * value;
  }
  return sum((squares[0] + squares[1]) + (squares[2] + squares[3]));
}

}  // namespace
}  // namespace sgf
