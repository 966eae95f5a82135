// residual_linear for M > 16 on Hopper: h' = a W^T + b + (h | h S | h + t V), and each row's sum of squares of the
// rounded h'.
//
//      k ->        first pair            second pair: h and S, or t and V
//     +---------------------------------+--------------+
//     | a [M, K]                        | h [M, K2]    |    one accumulator: steps of 64 k of one pair, then of the
//     +---------------------------------+--------------+    other; the copy engine fills up each one's last step
//     | W [n, K]                        | S [K2, n]    |    with zeros
//     +---------------------------------+--------------+
//
// The matmul is that of prefill.cuh. S lies along n, as it is stored, or along k, as the transposed view of a linear
// layer's weight: the tensor cores read both. A tile leaves each row's sum of squares over its columns in the
// workspace; row_totals adds those up over the tiles, in order: same inputs, same bits.
//
//     FLOPs  2 M n (K + K2)
//     Bytes  2 (M K + n K + M K2 + n K2 + M n) once, and 2 M n for an h that is added
//     Floor  at M=4096, n=3072, K=4096, K2=3072, bf16, one H200 (780 TFLOP/s): 231 us
//     Share  not yet measured
#include "cuda/prefill.cuh"

namespace {

using namespace sgf::prefill;

struct ResidualArguments {
  const uint16_t* bias;
  const uint16_t* residual;
  uint16_t* y;
  int64_t stride_residual, stride_y;
  float* squares;  // [tiles across][M]
};

template <int kWidth, class Element>
struct ResidualEpilogue {
  using Arguments = ResidualArguments;
  using S = Shape<kWidth>;
  static constexpr int kBatch = S::kChunks / 2;  // chunks whose residuals are loaded at once

  const Problem& p;
  const ResidualArguments& a;
  const Place place;
  const Columns columns;
  const int row;
  Bias<kWidth> bias;

  __device__ __forceinline__ ResidualEpilogue(const Problem& p, const ResidualArguments& a, Place place,
                                              const Columns& columns, int row)
      : p(p), a(a), place(place), columns(columns), row(row), bias(a.bias, columns) {}

  __device__ __forceinline__ void finish(const float (&sums)[S::kAccumulators]) {
    const int member = threadIdx.x % 4;
#pragma unroll
    for (Words& words : bias.runs) transpose(words);
    float squares[2] = {0, 0};
#pragma unroll
    for (int first = 0; first < S::kChunks; first += kBatch) {
      Words batch[2][kBatch];  // the residual, and then y
#pragma unroll
      for (int below = 0; below < 2; ++below) {
        const int64_t m = row + 8 * below;
        const uint16_t* residual = a.residual + m * a.stride_residual;
        const bool exists = a.residual != nullptr && m < p.M;
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          const Run run = run_of(kWidth, columns, first + i, member);
          batch[below][i] = load_run(residual + run.column, exists ? run.count : 0);
        }
      }
#pragma unroll
      for (int below = 0; below < 2; ++below) {
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          Words& words = batch[below][i];
          transpose(words);
#pragma unroll
          for (int block = 0; block < 4; ++block) {
            const float* sum = sums + accumulator_of(first + i, block, below);
            const uint32_t added = bias.runs[first + i].pair[block];
            uint32_t& pair = words.pair[block];
            pair = Element::pack(sum[0] + Element::low(added) + Element::low(pair),
                                 sum[1] + Element::high(added) + Element::high(pair));
          }
          transpose(words);
        }
      }
#pragma unroll
      for (int below = 0; below < 2; ++below) {
        const int64_t m = row + 8 * below;
        uint16_t* y = a.y + m * a.stride_y;
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          const Run run = run_of(kWidth, columns, first + i, member);
          const Words& words = batch[below][i];
          float square = 0;
#pragma unroll
          for (int e = 0; e < kRun; ++e) {
            const uint32_t pair = words.pair[e / 2];
            const float value = e % 2 == 0 ? Element::low(pair) : Element::high(pair);
            square += e < run.count ? value * value : 0;
          }
          squares[below] += square;
          store_run(y + run.column, words, m < p.M ? run.count : 0);
        }
      }
    }
#pragma unroll
    for (int below = 0; below < 2; ++below) {
      squares[below] += __shfl_xor_sync(0xffffffff, squares[below], 1);
      squares[below] += __shfl_xor_sync(0xffffffff, squares[below], 2);
      const int64_t m = row + 8 * below;
      if (member == 0 && m < p.M) a.squares[static_cast<int64_t>(place.column) * p.M + m] = squares[below];
    }
  }
};

template <int kWidth, class Element>
__global__ __launch_bounds__(kThreads,
                             1) void residual_linear_prefill(const __grid_constant__ Problem p,
                                                             const __grid_constant__ ResidualArguments arguments) {
  run<kWidth, Element, true, ResidualEpilogue<kWidth, Element>>(p, arguments);
}

constexpr int kTotalsThreads = 128;

__global__ void row_totals(const float* squares, int tiles, int M, float* sumsq) {
  sgf::let_next_start();
  sgf::wait_for_previous();
  const int64_t m = static_cast<int>(blockIdx.x) * kTotalsThreads + static_cast<int>(threadIdx.x);
  if (m >= M) return;
  float total = 0;
  for (int tile = 0; tile < tiles; ++tile, squares += M) total += squares[m];
  sumsq[m] = total;
}

template <class Element>
constexpr auto kernel_of(int width) {
  return width == 256   ? residual_linear_prefill<256, Element>
         : width == 192 ? residual_linear_prefill<192, Element>
                        : residual_linear_prefill<128, Element>;
}

}  // namespace

int64_t sgf_cuda_residual_linear_prefill_workspace(int M, int n) { return squares_cells(M, n); }

int sgf_cuda_residual_linear_prefill(sgf_matrix a, sgf_matrix weight, sgf_matrix bias, sgf_matrix residual,
                                     sgf_matrix a2, sgf_matrix weight2, sgf_matrix y, sgf_matrix sumsq, int dtype,
                                     int sms, sgf_matrix workspace, uintptr_t stream) {
  if (y.data == nullptr || sumsq.data == nullptr || a2.columns < 0 || a2.columns > kMaxSize) {
    return SGF_CUDA_BAD_ARGUMENT;
  }
  if (const int status = check_prefill(a.rows, weight.rows, a.columns, dtype, sms)) return status;
  if (workspace.columns < squares_cells(a.rows, weight.rows)) return SGF_CUDA_WORKSPACE;
  const bool paired = a2.columns > 0, along_n = paired && sgf::has_rows(weight2);
  const sgf_matrix right2 = along_n ? weight2 : sgf::transposed(weight2);
  if (const int status = check_copied(a)) return status;
  if (const int status = check_copied(weight)) return status;
  if (paired) {
    if (const int status = check_copied(a2)) return status;
    if (const int status = check_copied(right2)) return status;
  }
  if (const int status = sgf::check_operands({bias, residual, y}, sizeof(uint16_t))) return status;
  if (const int status = sgf::check_operands({sumsq, workspace}, sizeof(float))) return status;

  Problem p{};
  p.M = static_cast<int>(a.rows), p.scaled = static_cast<int>(weight.rows), p.along_n = along_n;
  p.steps_first = steps_in(static_cast<int>(a.columns));
  p.steps = p.steps_first + steps_in(static_cast<int>(a2.columns));
  const int width = choose_width(p.M, p.scaled, 0, false, p.steps, sms);
  if (const int status = make_maps(p, 0, a, weight, width, dtype)) return status;
  if (paired) {
    if (const int status = make_maps(p, 1, a2, right2, width, dtype)) return status;
  }
  float* const squares = static_cast<float*>(workspace.data);
  const ResidualArguments arguments{static_cast<const uint16_t*>(bias.data),
                                    static_cast<const uint16_t*>(residual.data),
                                    static_cast<uint16_t*>(y.data),
                                    residual.row_stride,
                                    y.row_stride,
                                    squares};
  if (const int status = launch_prefill(dtype == SGF_BFLOAT16 ? kernel_of<Bfloat16>(width) : kernel_of<Half>(width),
                                        width, sms, stream, p, arguments)) {
    return status;
  }
  const dim3 grid(static_cast<unsigned>(ceil_div(p.M, kTotalsThreads)));
  return sgf::launch(row_totals, {grid, kTotalsThreads}, stream, squares, tiles_across(width, p.scaled, 0, false), p.M,
                     static_cast<float*>(sumsq.data));
}
