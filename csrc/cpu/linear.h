// The matmuls of norm_linear and residual_linear for few rows, where streaming the weights is the work.
//
//            K                                  y [M, n]: thread 0   thread 1
//   a [M,K] +-----+      W [n,K] +-----+             +------------+------------+
//           |     |              | >>> | 4, 8 rows   |  columns   |  columns   |   fp32 sums, then scale, bias,
//           +-----+              |     |   --->      +------------+------------+   activation, residual, rounding
//      in L1 or L2               +-----+
//
// Every weight is read once, and a thread owns a range of y's columns. A weight with contiguous rows (W, and S stored
// transposed) is taken four or eight rows at a time: dot products along K, whose partial sums stay in registers for up
// to six rows of a. A weight with contiguous columns (S as it is, V) is taken eight steps of K at a time, each times
// a[m, k] onto the thread's row of sums, which stays in L1. Both operand pairs of a sum, (a, W) and (h, S), share the
// sums.
//
// bf16 goes through the dot-product instruction for pairs where there is one; elsewhere a word of two numbers becomes
// two fp32 numbers by a shift and a mask, so `a` is laid out beforehand with even and odd numbers apart.
//
//     FLOPs  2 M n K
//     Bytes  n K times 2 or 4
//     Floor  K = 3072, n = 4096, two cores of an AMD EPYC with AVX-512-BF16, where torch's best reader reached 32 GB/s
//            (machine_rates of slicegpt_fast/benchmark.py): 0.78 ms in 16 bits, 1.56 ms in fp32
//     Share  of that bandwidth, at M = 1 / 4 / 8: bf16 1.01 / 0.93 / 0.76, fp16 1.05 / 0.92 / 0.62,
//            fp32 1.04 / 0.93 / 0.86; K = 456, n = 960 in bf16, 0.9 MB: 0.58 at M = 1
#pragma once

#include "arithmetic.h"
#include "cpu/activation.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"
#include "slicegpt_fast.h"

namespace sgf {

// One operand pair: a W^T.
struct Term {
  sgf_matrix a;  // [M, K], rows contiguous
  sgf_matrix w;  // [n, K], rows or columns contiguous
  int64_t K;
};

// What a call of either op comes to.
struct Linear {
  int dtype, threads;
  int64_t M, n;
  Term terms[2];
  int terms_used;
  sgf_matrix residual;  // [M, n] or absent: what the sums begin with
  bool scaled;          // by 1 / sqrt(sumsq / width + eps)
  const float* sumsq;   // [M] or null: of the first term's a
  double eps, width;
  const void* bias;  // [n - unscaled] or null
  int activation;
  int64_t unscaled;   // columns at the end that get no scale, bias and activation
  sgf_matrix y;       // [M, out], contiguous
  float* sumsq_of_y;  // [M] or null
  float* workspace;
};

#if defined(__x86_64__)
void linear_avx2(const Linear& call);
void linear_avx512(const Linear& call);
void linear_avx512bf16(const Linear& call);
#endif

namespace {

// Workspace, in floats: `a` of either term as the kernel wants it, the sums, the scales.
constexpr int64_t padded(int64_t size) { return ceil_div(size, 32) * 32; }

constexpr int64_t workspace_floats(int64_t M, int64_t n, int64_t K0, int64_t K1) {
  return M * (padded(n) + padded(K0) + padded(K1)) + padded(M);
}

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
    for (int r = 0; r < columns; ++r) sums[m * sums_stride + r] += sum(partial[m][r]);
  }
}

// The same for M rows of a, `rows` at a time and then fewer.
template <int rows, int columns, class T, class Kept = typename Operand<T>::Kept>
inline void dot_tiles(int64_t M, const Kept* a, int64_t a_stride, const T* w, int64_t w_stride, int64_t K, float* sums,
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

template <class T>
class Kernel {
 public:
  explicit Kernel(const Linear& call) : call_(call), sums_stride_(padded(call.n)) {
    float* next = call.workspace;
    const auto take = [&next](int64_t count) { return (next += count) - count; };
    sums_ = take(call.M * sums_stride_);
    scale_ = take(padded(call.M));
    for (int i = 0; i < call.terms_used; ++i) kept_[i] = take(call.M * padded(call.terms[i].K));
  }

  void run() const {
    for (int64_t m = 0; m < call_.M; ++m) {
      for (int i = 0; i < call_.terms_used; ++i) keep(call_.terms[i], kept_[i], m);
      if (call_.scaled) scale_[m] = scale(call_.terms[0], m);
    }
    const bool gated = call_.activation == SGF_SILU_GATE;
    const int64_t scaled = call_.n - call_.unscaled, half = scaled / 2;
    const int64_t blocks = ceil_div(call_.n, kBlock);
    const int parts = static_cast<int>(call_.threads < blocks ? call_.threads : blocks);
    parallel(parts, [&](int part) {
      const Range columns = share(gated ? half : scaled, part, parts), plain = share(call_.unscaled, part, parts);
      add_up(columns.begin, columns.end);
      if (gated) add_up(half + columns.begin, half + columns.end);
      add_up(scaled + plain.begin, scaled + plain.end);
      for (int64_t m = 0; m < call_.M; ++m) {
        gated ? gate(m, half, columns) : finish(m, columns);
        copy(m, {scaled + plain.begin, scaled + plain.end});
      }
    });
    if (call_.sumsq_of_y != nullptr) {
      for (int64_t m = 0; m < call_.M; ++m) call_.sumsq_of_y[m] = sum_of_squares(y(m), call_.y.columns);
    }
  }

 private:
  using Step = Operand<T>;
  using Kept = typename Step::Kept;
  static constexpr int64_t kBlock = 16;  // threads' ranges begin at multiples

  struct Range {
    int64_t begin, end;
  };

  static Range share(int64_t count, int64_t part, int64_t parts) {
    const int64_t blocks = ceil_div(count, kBlock);
    const int64_t begin = part * blocks / parts * kBlock, end = (part + 1) * blocks / parts * kBlock;
    return {begin < count ? begin : count, end < count ? end : count};
  }

  static bool by_rows(const Term& term) { return term.w.column_stride == 1 || term.K == 1; }

  T* y(int64_t m) const { return static_cast<T*>(call_.y.data) + m * call_.y.columns; }
  float* sums(int64_t m) const { return sums_ + m * sums_stride_; }

  float scale(const Term& term, int64_t m) const {
    const T* h = static_cast<const T*>(term.a.data) + m * term.a.row_stride;
    const double squares = call_.sumsq != nullptr ? call_.sumsq[m] : sum_of_squares(h, term.K);
    return static_cast<float>(1.0 / __builtin_sqrt(squares / call_.width + call_.eps));
  }

  // Row m of `a`, in the form that the products take, with zeros up to a whole step.
  static void keep(const Term& term, float* kept, int64_t m) {
    const T* from = static_cast<const T*>(term.a.data) + m * term.a.row_stride;
    if (by_rows(term)) {
      Kept* to = reinterpret_cast<Kept*>(kept) + m * padded(term.K);
      int64_t k = 0;
      for (; k + Step::kStep <= term.K; k += Step::kStep) Step::of(from + k).keep(to + k);
      if (k < term.K) Step::of(from + k, term.K - k).keep(to + k);
    } else {
      float* to = kept + m * padded(term.K);
      int64_t k = 0;
      for (; k + kLanes <= term.K; k += kLanes) store(to + k, load(from + k));
      if (k < term.K) store(to + k, load(from + k, term.K - k));
    }
  }

  // The sums of columns begin ... end.
  void add_up(int64_t begin, int64_t end) const {
    for (int64_t m = 0; m < call_.M; ++m) start(m, begin, end);
    for (int i = 0; i < call_.terms_used; ++i) {
      const Term& term = call_.terms[i];
      const T* w = static_cast<const T*>(term.w.data);
      if (by_rows(term)) {
        add_rows(term, reinterpret_cast<const Kept*>(kept_[i]), w, begin, end);
      } else {
        add_columns(term, kept_[i], w, begin, end);
      }
    }
  }

  void add_rows(const Term& term, const Kept* a, const T* w, int64_t begin, int64_t end) const {
    if (call_.M <= kFewRows) {
      begin = add_rows<kFewRows, 8>(term, a, w, begin, end);
    } else {
      begin = add_rows<kTileRows, 4>(term, a, w, begin, end);
    }
    add_rows<kTileRows, 1>(term, a, w, begin, end);
  }

  // As many whole tiles as fit; returns where they end.
  template <int rows, int columns>
  int64_t add_rows(const Term& term, const Kept* a, const T* w, int64_t begin, int64_t end) const {
    const int64_t stride = term.w.row_stride;
    for (; begin + columns <= end; begin += columns) {
      dot_tiles<rows, columns>(call_.M, a, padded(term.K), w + begin * stride, stride, term.K, sums_ + begin,
                               sums_stride_);
    }
    return begin;
  }

  void add_columns(const Term& term, const float* a, const T* w, int64_t begin, int64_t end) const {
    const int64_t a_stride = padded(term.K), w_stride = term.w.column_stride, n = end - begin;
    w += begin;
    int64_t k = 0;
    for (; k + 8 <= term.K; k += 8, w += 8 * w_stride) {
      add_steps<8>(call_.M, a + k, a_stride, w, w_stride, n, sums_ + begin, sums_stride_);
    }
    for (; k < term.K; ++k, w += w_stride) {
      add_steps<1>(call_.M, a + k, a_stride, w, w_stride, n, sums_ + begin, sums_stride_);
    }
  }

  // What the sums begin with.
  void start(int64_t m, int64_t begin, int64_t end) const {
    const T* residual = static_cast<const T*>(call_.residual.data) + m * call_.residual.row_stride;
    for (int64_t j = begin; j < end; j += kLanes) {
      store(sums(m) + j, call_.residual.data == nullptr ? Floats{} : load(residual + j, end - j), end - j);
    }
  }

  // The first `count` sums, scaled and with their bias.
  Floats value(int64_t m, int64_t j, int64_t count) const {
    Floats x = load(sums(m) + j, count);
    if (call_.scaled) x *= scale_[m];
    return call_.bias == nullptr ? x : x + load(static_cast<const T*>(call_.bias) + j, count);
  }

  void finish(int64_t m, Range columns) const {
    for (int64_t j = columns.begin; j < columns.end; j += kLanes) {
      store(y(m) + j, activate(call_.activation, value(m, j, columns.end - j)), columns.end - j);
    }
  }

  void gate(int64_t m, int64_t half, Range columns) const {
    for (int64_t j = columns.begin; j < columns.end; j += kLanes) {
      const int64_t count = columns.end - j;
      store(y(m) + j, silu(value(m, j, count)) * value(m, half + j, count), count);
    }
  }

  // Columns that stay as they are.
  void copy(int64_t m, Range columns) const {
    T* const to = y(m) + call_.y.columns - call_.n;
    for (int64_t j = columns.begin; j < columns.end; j += kLanes) {
      store(to + j, load(sums(m) + j, columns.end - j), columns.end - j);
    }
  }

  const Linear& call_;
  const int64_t sums_stride_;
  float* sums_;
  float* scale_;
  float* kept_[2];
};

inline void run_linear(const Linear& call) {
  switch (call.dtype) {
    case SGF_FLOAT32:
      return Kernel<float>(call).run();
    case SGF_FLOAT16:
      return Kernel<Float16>(call).run();
    case SGF_BFLOAT16:
      return Kernel<BFloat16>(call).run();
  }
}

}  // namespace
}  // namespace sgf
