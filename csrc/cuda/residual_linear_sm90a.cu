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
// With few rows there are fewer tiles than clusters, and more of these share the k of a tile: residual_linear_partial
// leaves the sums of each split in the workspace in fp32, and finish_rows, in the place of row_totals, adds them in
// order and does the rest, a block per row. All SMs take part in that: at M=64, n=3072, 4 splits it reads 3 MB from L2.
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
  static constexpr int kBatch = (S::kChunks + 1) / 2;  // chunks whose residuals are loaded at once

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
        for (int i = 0; i < kBatch && first + i < S::kChunks; ++i) {
          const Run run = run_of(kWidth, columns, first + i, member);
          batch[below][i] = load_run(residual + run.column, exists ? run.count : 0);
        }
      }
#pragma unroll
      for (int below = 0; below < 2; ++below) {
#pragma unroll
        for (int i = 0; i < kBatch && first + i < S::kChunks; ++i) {
          Words& words = batch[below][i];
          transpose(words);
#pragma unroll
          for (int block = 0; block < 4 && has_block(kWidth, first + i, block); ++block) {
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
        for (int i = 0; i < kBatch && first + i < S::kChunks; ++i) {
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

// The sums of one split, as they are.
struct Partial {
  float* sums;  // [splits][M][stride]
  int64_t stride;
};

template <int kWidth>
struct PartialEpilogue {
  using Arguments = Partial;
  using S = Shape<kWidth>;

  const Problem& p;
  float* to;
  const int64_t stride;
  const int row;

  __device__ __forceinline__ PartialEpilogue(const Problem& p, const Partial& a, Place place, const Columns&, int row)
      : p(p),
        to(a.sums + (static_cast<int64_t>(place.split) * p.M + row) * a.stride + place.column * kWidth),
        stride(a.stride),
        row(row) {}

  __device__ __forceinline__ void finish(const float (&sums)[S::kAccumulators]) {
#pragma unroll
    for (int below = 0; below < 2; ++below) {
      if (row + 8 * below >= p.M) return;
#pragma unroll
      for (int c = 2 * below; c < S::kAccumulators; c += 4) {
        float* pair = to + 8 * below * stride + accumulator_column(threadIdx.x % 128, c);
        *reinterpret_cast<float2*>(pair) = make_float2(sums[c], sums[c + 1]);
      }
    }
  }
};

template <int kWidth, class Element>
__global__ __launch_bounds__(kThreads, 1) void residual_linear_partial(const __grid_constant__ Problem p,
                                                                       const __grid_constant__ Partial arguments) {
  run<kWidth, Element, true, PartialEpilogue<kWidth>>(p, arguments);
}

constexpr int kRowThreads = 256;

// h' of one row per block, from the sums of all splits, and its sum of squares.
template <class Element>
__global__ __launch_bounds__(kRowThreads) void finish_rows(Partial partial, int splits, const ResidualArguments a,
                                                           int n, float* sumsq) {
  __shared__ float squares[kRowThreads / 32];
  sgf::let_next_start();
  sgf::wait_for_previous();
  const int64_t m = blockIdx.x, M = gridDim.x;
  float square = 0;
  for (int column = static_cast<int>(threadIdx.x) * kRun; column < n; column += kRowThreads * kRun) {
    const int count = clamp(n - column, kRun);
    const Words bias = load_run(a.bias + column, a.bias == nullptr ? 0 : count);
    const Words residual = load_run(a.residual + m * a.stride_residual + column, a.residual == nullptr ? 0 : count);
    float sums[kRun] = {};
    const float* from = partial.sums + m * partial.stride + column;
#pragma unroll 4
    for (int split = 0; split < splits; ++split, from += M * partial.stride) {
      const float4 low = reinterpret_cast<const float4*>(from)[0], high = reinterpret_cast<const float4*>(from)[1];
      sums[0] += low.x, sums[1] += low.y, sums[2] += low.z, sums[3] += low.w;
      sums[4] += high.x, sums[5] += high.y, sums[6] += high.z, sums[7] += high.w;
    }
    Words words;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      words.pair[i] = Element::pack(sums[2 * i] + Element::low(bias.pair[i]) + Element::low(residual.pair[i]),
                                    sums[2 * i + 1] + Element::high(bias.pair[i]) + Element::high(residual.pair[i]));
      const float low = Element::low(words.pair[i]), high = Element::high(words.pair[i]);
      square += 2 * i < count ? low * low : 0;
      square += 2 * i + 1 < count ? high * high : 0;
    }
    store_run(a.y + m * a.stride_y + column, words, count);
  }
#pragma unroll
  for (int apart = 16; apart > 0; apart /= 2) square += __shfl_xor_sync(0xffffffff, square, apart);
  if (threadIdx.x % 32 == 0) squares[threadIdx.x / 32] = square;
  __syncthreads();
  if (threadIdx.x != 0) return;
  float total = 0;
  for (float warp : squares) total += warp;
  sumsq[m] = total;
}

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

// What a launch works on, and where its results go.
struct Call {
  Problem p;
  Deal deal;
  ResidualArguments arguments;
  float* sumsq;
  int sms;
  uintptr_t stream;

  int across() const { return tiles_across(deal.width, p.scaled, 0, false); }

  template <class Element>
  int whole() {
    const auto kernel_of = [](auto width) { return residual_linear_prefill<width, Element>; };
    if (const int status = launch_prefill(kernel_of, p, deal, sms, stream, arguments)) return status;
    const dim3 grid(static_cast<unsigned>(ceil_div(p.M, kTotalsThreads)));
    return sgf::hopper::launch(row_totals, {grid, kTotalsThreads}, stream, arguments.squares, across(), p.M, sumsq);
  }

  template <class Element>
  int split() {
    const auto kernel_of = [](auto width) { return residual_linear_partial<width, Element>; };
    const Partial partial{arguments.squares, static_cast<int64_t>(across()) * deal.width};
    if (const int status = launch_prefill(kernel_of, p, deal, sms, stream, partial)) return status;
    const dim3 grid(static_cast<unsigned>(p.M));
    return sgf::hopper::launch(finish_rows<Element>, {grid, kRowThreads}, stream, partial, deal.splits, arguments,
                               p.scaled, sumsq);
  }

  template <class Element>
  int launch() {
    return deal.splits == 1 ? whole<Element>() : split<Element>();
  }
};

}  // namespace

sgf_cuda_prefill_plan sgf_cuda_residual_linear_prefill_plan(int M, int n, int K, int K2, int sms) {
  const Deal deal = choose_deal(M, n, 0, false, steps_in(K) + steps_in(K2), sms, true);
  return {deal.width, deal.splits, cells_of(deal, M, n)};
}

int sgf_cuda_residual_linear_prefill(sgf_matrix a, sgf_matrix weight, sgf_matrix bias, sgf_matrix residual,
                                     sgf_matrix a2, sgf_matrix weight2, sgf_matrix y, sgf_matrix sumsq, int dtype,
                                     int width, int splits, int sms, sgf_matrix workspace, uintptr_t stream) {
  if (y.data == nullptr || sumsq.data == nullptr || a2.columns < 0 || a2.columns > kMaxSize) {
    return SGF_CUDA_BAD_ARGUMENT;
  }
  if (const int status = check_prefill(a.rows, weight.rows, a.columns, dtype, sms)) return status;
  const bool paired = a2.columns > 0, along_n = paired && sgf::has_rows(weight2);
  Problem p{};
  p.M = static_cast<int>(a.rows), p.scaled = static_cast<int>(weight.rows), p.along_n = along_n;
  p.steps_first = steps_in(static_cast<int>(a.columns));
  p.steps = p.steps_first + steps_in(static_cast<int>(a2.columns));
  const Deal deal{width, splits};
  if (const int status = check_deal(p, deal)) return status;
  if (workspace.columns < cells_of(deal, p.M, p.scaled)) return SGF_CUDA_WORKSPACE;

  const sgf_matrix right2 = along_n ? weight2 : sgf::transposed(weight2);
  if (const int status = check_copied(a)) return status;
  if (const int status = check_copied(weight)) return status;
  if (paired) {
    if (const int status = check_copied(a2)) return status;
    if (const int status = check_copied(right2)) return status;
  }
  if (const int status = sgf::check_operands({bias, residual, y}, sizeof(uint16_t))) return status;
  if (const int status = sgf::check_operands({sumsq}, sizeof(float))) return status;
  if (const int status = sgf::check_operands({workspace}, sizeof(float4))) return status;

  if (const int status = make_maps(p, 0, a, weight, width, dtype)) return status;
  if (paired) {
    if (const int status = make_maps(p, 1, a2, right2, width, dtype)) return status;
  }
  const ResidualArguments arguments{static_cast<const uint16_t*>(bias.data),
                                    static_cast<const uint16_t*>(residual.data),
                                    static_cast<uint16_t*>(y.data),
                                    residual.row_stride,
                                    y.row_stride,
                                    static_cast<float*>(workspace.data)};
  Call call{p, deal, arguments, static_cast<float*>(sumsq.data), sms, stream};
  return dtype == SGF_BFLOAT16 ? call.launch<Bfloat16>() : call.launch<Half>();
}
