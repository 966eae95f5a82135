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

#include "cpu/activation.h"
#include "cpu/dots.h"
#include "cpu/quantized.h"
#include "slicegpt_fast.h"

namespace sgf {

// One operand pair: a W^T.
struct Term {
  sgf_matrix a;       // [M, K], rows contiguous
  sgf_matrix w;       // [n, K], rows or columns contiguous; of a quantised one rows
  sgf_matrix scales;  // of a quantised w
  int64_t K;
  int w_dtype;  // that of the call, or SGF_INT8 or SGF_INT4
};

// What a call of either op comes to.
struct Linear {
  int dtype;
  int64_t M, n;
  Term terms[2];
  int terms_used;
  sgf_matrix residual;  // [M, n] or absent: what the sums begin with
  bool scaled;          // by 1 / sqrt(sumsq / width + eps)
  const float* sumsq;   // [M] or null: of the first term's a
  double eps, width;
  const void* norm_weight;  // [K] or null: the first term's a is normalised and multiplied by it, rounded each time
  const void* bias;         // [n - unscaled] or null
  int activation;
  int64_t unscaled;       // columns at the end that get no scale, bias and activation
  float unscaled_factor;  // but this
  sgf_matrix y;           // [M, out], contiguous
  float* sumsq_of_y;      // [M] or null
  float* workspace;
};

// A call in steps: one thread prepares, then each of `parts` computes its share of y, then one finishes.
struct LinearKernel {
  void (*prepare)(const Linear& call);
  void (*share)(const Linear& call, int part, int parts);
  void (*finish)(const Linear& call);
  // Rows begin ... end of y, the weight that levels and scales stand for.
  void (*dequantize)(const sgf_matrix& weight, const sgf_matrix& scales, const sgf_matrix& y, int64_t begin,
                     int64_t end, int weight_dtype, int dtype);
};

// That of the machine; null where SLICEGPT_FAST_CPU_ISA names no level.
const LinearKernel* linear_kernel();

// The calls of slicegpt_fast.h, without their workspace.
Linear norm_linear(sgf_matrix h, sgf_matrix weight, sgf_matrix scales, sgf_matrix bias, sgf_matrix sumsq,
                   sgf_matrix product, sgf_matrix y, int64_t unscaled, double eps, double full_width, int activation,
                   int weight_dtype, int dtype);
Linear residual_linear(sgf_matrix a, sgf_matrix weight, sgf_matrix scales, sgf_matrix bias, sgf_matrix residual,
                       sgf_matrix a2, sgf_matrix weight2, sgf_matrix y, sgf_matrix sumsq, int weight_dtype, int dtype);

#if defined(__x86_64__)
extern const LinearKernel kLinearAvx2, kLinearAvx512, kLinearAvx512Bf16;
#endif

namespace {

// Threads' ranges of y's columns begin at multiples.
constexpr int64_t kLinearBlock = 16;

constexpr int linear_parts(int64_t n, int threads) {
  const int64_t blocks = ceil_div(n, kLinearBlock);
  return threads < blocks ? threads : static_cast<int>(blocks);
}

// Numbers of a row of `a`, up to a whole step of the kernel.
constexpr int64_t kept_size(const Term& term) {
  return term.w_dtype == SGF_INT4 ? ceil_div(term.K, kWidestStep) * kWidestStep : padded(term.K);
}

// Workspace, in floats: the sums, the scales, `a` of either term as the kernel wants it, and a normalised row.
inline int64_t workspace_floats(int64_t M, const Linear& call) {
  const Term* terms = call.terms;
  return M * (padded(call.n) + kept_size(terms[0]) + kept_size(terms[1])) + padded(M) + padded(terms[0].K);
}

template <class T>
class Kernel {
 public:
  explicit Kernel(const Linear& call) : call_(call), sums_stride_(padded(call.n)) {
    float* next = call.workspace;
    const auto take = [&next](int64_t count) { return (next += count) - count; };
    sums_ = take(call.M * sums_stride_);
    scale_ = take(padded(call.M));
    for (int i = 0; i < call.terms_used; ++i) kept_[i] = take(call.M * kept_size(call.terms[i]));
    if (call.norm_weight != nullptr) normed_ = reinterpret_cast<T*>(take(padded(call.terms[0].K)));
  }

  void prepare() const {
    for (int64_t m = 0; m < call_.M; ++m) {
      for (int i = 0; i < call_.terms_used; ++i) keep(call_.terms[i], kept_[i], m, i == 0 && normed_ != nullptr);
      if (call_.scaled) scale_[m] = normed_ == nullptr ? scale(call_.terms[0], m) : 1.0f;
    }
  }

  void share(int part, int parts) const {
    const bool gated = call_.activation == SGF_SILU_GATE;
    const int64_t scaled = call_.n - call_.unscaled, half = scaled / 2;
    const Range columns = range(gated ? half : scaled, part, parts), plain = range(call_.unscaled, part, parts);
    add_up(columns.begin, columns.end);
    if (gated) add_up(half + columns.begin, half + columns.end);
    add_up(scaled + plain.begin, scaled + plain.end);
    for (int64_t m = 0; m < call_.M; ++m) {
      gated ? gate(m, half, columns) : finish(m, columns);
      copy(m, {scaled + plain.begin, scaled + plain.end});
    }
  }

  void finish() const {
    if (call_.sumsq_of_y == nullptr) return;
    for (int64_t m = 0; m < call_.M; ++m) call_.sumsq_of_y[m] = sum_of_squares(y(m), call_.y.columns);
  }

 private:
  using Step = Operand<T>;
  using Kept = typename Step::Kept;
  using Levelled = typename Dequantized<T>::Numbers;

  struct Range {
    int64_t begin, end;
  };

  static Range range(int64_t count, int64_t part, int64_t parts) {
    const int64_t blocks = ceil_div(count, kLinearBlock);
    const int64_t begin = part * blocks / parts * kLinearBlock, end = (part + 1) * blocks / parts * kLinearBlock;
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

  // Row m of `a`, in the form that the products take.
  void keep(const Term& term, float* kept, int64_t m, bool normalised) const {
    const T* from = static_cast<const T*>(term.a.data) + m * term.a.row_stride;
    if (normalised) from = normalise(term, from, scale(term, m));
    Kept* const to_dot = reinterpret_cast<Kept*>(kept) + m * kept_size(term);
    if (term.w_dtype == SGF_INT8) {
      keep_for<EightBits<Levelled>>(from, term.K, to_dot);
    } else if (term.w_dtype == SGF_INT4) {
      keep_for<FourBits<Levelled>>(from, term.K, to_dot);
    } else if (by_rows(term)) {
      keep_row(from, term.K, to_dot);
    } else {
      float* to = kept + m * padded(term.K);
      for (int64_t k = 0; k < term.K; k += kLanes) store(to + k, load(from + k, term.K - k));
    }
  }

  const T* normalise(const Term& term, const T* from, float scale) const {
    const T* weight = static_cast<const T*>(call_.norm_weight);
    for (int64_t k = 0; k < term.K; k += kLanes) {
      const int64_t count = term.K - k;
      store(normed_ + k, load(from + k, count) * scale, count);
      store(normed_ + k, load(normed_ + k, count) * load(weight + k, count), count);
    }
    return normed_;
  }

  // The sums of columns begin ... end.
  void add_up(int64_t begin, int64_t end) const {
    for (int64_t m = 0; m < call_.M; ++m) start(m, begin, end);
    for (int i = 0; i < call_.terms_used; ++i) {
      const Term& term = call_.terms[i];
      const T* w = static_cast<const T*>(term.w.data);
      if (term.w_dtype == SGF_INT8) {
        dot<EightBits, false>(term, kept_[i], begin, end);
      } else if (term.w_dtype == SGF_INT4) {
        term.scales.columns == 1 ? dot<FourBits, false>(term, kept_[i], begin, end)
                                 : dot<FourBits, true>(term, kept_[i], begin, end);
      } else if (by_rows(term)) {
        dot_rows(call_.M, reinterpret_cast<const Kept*>(kept_[i]), padded(term.K), w, term.w.row_stride, term.K, sums_,
                 sums_stride_, begin, end);
      } else {
        add_rows(call_.M, kept_[i], padded(term.K), w + begin, term.w.column_stride, term.K, end - begin, sums_ + begin,
                 sums_stride_);
      }
    }
  }

  template <template <class> class Bits, bool grouped>
  void dot(const Term& term, const float* kept, int64_t begin, int64_t end) const {
    const Quantized<T, Bits, grouped> w{static_cast<const uint8_t*>(term.w.data), term.w.row_stride,
                                        static_cast<const Float16*>(term.scales.data), term.scales.row_stride,
                                        group_of(term.scales.columns, term.K)};
    dot_rows(call_.M, reinterpret_cast<const Kept*>(kept), kept_size(term), w, 1, term.K, sums_, sums_stride_, begin,
             end);
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
      store(to + j, load(sums(m) + j, columns.end - j) * call_.unscaled_factor, columns.end - j);
    }
  }

  const Linear& call_;
  const int64_t sums_stride_;
  float* sums_;
  float* scale_;
  float* kept_[2];
  T* normed_ = nullptr;
};

// f(kernel) with the kernel of the call's dtype.
template <class Function>
inline void with_kernel(const Linear& call, Function&& f) {
  switch (call.dtype) {
    case SGF_FLOAT32:
      return f(Kernel<float>(call));
    case SGF_FLOAT16:
      return f(Kernel<Float16>(call));
    case SGF_BFLOAT16:
      return f(Kernel<BFloat16>(call));
  }
}

constexpr LinearKernel kLinear = {
    [](const Linear& call) { with_kernel(call, [](const auto& kernel) { kernel.prepare(); }); },
    [](const Linear& call, int part, int parts) {
      with_kernel(call, [=](const auto& kernel) { kernel.share(part, parts); });
    },
    [](const Linear& call) { with_kernel(call, [](const auto& kernel) { kernel.finish(); }); },
    [](const sgf_matrix& weight, const sgf_matrix& scales, const sgf_matrix& y, int64_t begin, int64_t end,
       int weight_dtype, int dtype) {
      const bool four = weight_dtype == SGF_INT4;
      switch (dtype) {
        case SGF_FLOAT32:
          return dequantize_rows<float>(weight, scales, y, begin, end, four);
        case SGF_FLOAT16:
          return dequantize_rows<Float16>(weight, scales, y, begin, end, four);
        case SGF_BFLOAT16:
          return dequantize_rows<BFloat16>(weight, scales, y, begin, end, four);
      }
    },
};

}  // namespace
}  // namespace sgf
