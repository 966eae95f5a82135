// norm_linear for M > 16 on Hopper: y = act(rsqrt(sumsq / D + eps) * (h W^T) + b), and plain h W^T for the unscaled
// rows of W.
//
//       W [n, d]                            y [M, n]
//     +------------------+   one tile     +----------+
//     | W rows           | -------------> | W cols   |   plain
//     +------------------+                +----------+
//     | W / 2 gate rows  | --+            +----------+
//     | ...              |   +----------> | W/2 cols |   silu_gate: a thread holds gate j and up j of a row
//     | W / 2 up rows    | --+            +----------+
//     +------------------+
//
// The matmul is that of prefill.cuh: the norm's scale commutes with it, so h goes from global memory to the tensor
// cores as it lies. Where nobody has row statistics, row_squares computes them beforehand: 2 M d bytes, 6 us at M=4096,
// d=3072 beside the matmul's 400, and h is in L2 afterwards. Summing in the matmul would have every warpgroup read its
// 64 rows from shared memory once more, for every tile across.
//
//     FLOPs  2 M n d
//     Bytes  2 (M d + n d + M n) once; from L2 2 M n d (1 / 256 + 1 / 256) at W = 256
//     Floor  at M=4096, n=12288, d=3072, bf16, one H200 (780 TFLOP/s): 396 us
//     Share  not yet measured
#include "cuda/activation.h"
#include "cuda/prefill.cuh"

namespace {

using namespace sgf::prefill;

struct NormArguments {
  const uint16_t* bias;
  const float* sumsq;
  uint16_t* y;
  int64_t stride_y;
  float eps, inverse_width;
};

template <int kWidth, class Element, int kActivation>
struct NormEpilogue {
  using Arguments = NormArguments;
  using S = Shape<kWidth>;
  static constexpr bool kGated = kActivation == SGF_SILU_GATE;

  const Problem& p;
  const NormArguments& a;
  const Columns columns;
  const int row;
  Bias<kWidth> bias;
  float sumsq[2];

  __device__ __forceinline__ NormEpilogue(const Problem& p, const NormArguments& a, Place, const Columns& columns,
                                          int row)
      : p(p), a(a), columns(columns), row(row), bias(columns.scaled ? a.bias : nullptr, columns) {
#pragma unroll
    for (int below = 0; below < 2; ++below) {
      const int64_t m = row + 8 * below;
      sumsq[below] = columns.scaled && m < p.M ? a.sumsq[m] : 0;
    }
  }

  __device__ __forceinline__ void finish(float (&sums)[S::kAccumulators]) {
    if (columns.scaled) {
      const float scale[2] = {rsqrtf(sumsq[0] * a.inverse_width + a.eps), rsqrtf(sumsq[1] * a.inverse_width + a.eps)};
#pragma unroll
      for (int chunk = 0; chunk < S::kChunks; ++chunk) {
        Words& words = bias.runs[chunk];
        transpose(words);
#pragma unroll
        for (int block = 0; block < 4; ++block) {
#pragma unroll
          for (int below = 0; below < 2 && has_block(kWidth, chunk, block); ++below) {
            float* sum = sums + accumulator_of(chunk, block, below);
            sum[0] = sum[0] * scale[below] + Element::low(words.pair[block]);
            sum[1] = sum[1] * scale[below] + Element::high(words.pair[block]);
          }
        }
      }
#pragma unroll
      for (int c = 0; c < (kGated ? S::kAccumulators / 2 : S::kAccumulators); ++c) {
        sums[c] = sgf::activate(sums[c], kActivation);
        if (kGated) sums[c] *= sums[c + S::kAccumulators / 2];
      }
    }
    Words words[2][S::kChunks];
#pragma unroll
    for (int below = 0; below < 2; ++below) {
#pragma unroll
      for (int chunk = 0; chunk < S::kChunks; ++chunk) {
#pragma unroll
        for (int block = 0; block < 4; ++block) {
          const float* sum = sums + accumulator_of(chunk, block, below);
          words[below][chunk].pair[block] = has_block(kWidth, chunk, block) ? Element::pack(sum[0], sum[1]) : 0;
        }
        transpose(words[below][chunk]);
      }
    }
    const int stored = kGated && columns.scaled ? S::kHalf : kWidth;
#pragma unroll
    for (int below = 0; below < 2; ++below) {
      const int64_t m = row + 8 * below;
      uint16_t* y = a.y + m * a.stride_y;
#pragma unroll
      for (int chunk = 0; chunk < S::kChunks; ++chunk) {
        const Run run = run_of(kWidth, columns, chunk, threadIdx.x % 4);
        const bool exists = m < p.M && run.column - columns.column < stored;
        store_run(y + run.column, words[below][chunk], exists ? run.count : 0);
      }
    }
  }
};

template <int kWidth, class Element, int kActivation>
__global__ __launch_bounds__(kThreads, 1) void norm_linear_prefill(const __grid_constant__ Problem p,
                                                                   const __grid_constant__ NormArguments arguments) {
  run<kWidth, Element, false, NormEpilogue<kWidth, Element, kActivation>>(p, arguments);
}

constexpr int kSquaresThreads = 256;
constexpr int kSquaresRows = kSquaresThreads / 32;

// One warp per row.
template <class Element>
__global__ __launch_bounds__(kSquaresThreads) void row_squares(const uint16_t* h, int64_t stride, int M, int K,
                                                               float* sumsq) {
  sgf::let_next_start();
  sgf::wait_for_previous();
  const int64_t row = static_cast<int>(blockIdx.x) * kSquaresRows + static_cast<int>(threadIdx.x) / 32;
  if (row >= M) return;
  float total = 0;
  for (int k = static_cast<int>(threadIdx.x % 32) * kRun; k < K; k += 32 * kRun) {
    const Words words = load_run(h + row * stride + k, clamp(K - k, kRun));
    float square = 0;
#pragma unroll
    for (uint32_t pair : words.pair) {
      const float low = Element::low(pair), high = Element::high(pair);
      square += low * low + high * high;
    }
    total += square;
  }
#pragma unroll
  for (int apart = 16; apart > 0; apart /= 2) total += __shfl_xor_sync(0xffffffff, total, apart);
  if (threadIdx.x % 32 == 0) sumsq[row] = total;
}

template <class Element>
auto kernel_of(int activation) {
  return [activation](auto width) {
    switch (activation) {
      case SGF_RELU:
        return norm_linear_prefill<width, Element, SGF_RELU>;
      case SGF_GELU:
        return norm_linear_prefill<width, Element, SGF_GELU>;
      case SGF_GELU_TANH:
        return norm_linear_prefill<width, Element, SGF_GELU_TANH>;
      case SGF_SILU_GATE:
        return norm_linear_prefill<width, Element, SGF_SILU_GATE>;
      default:
        return norm_linear_prefill<width, Element, SGF_NO_ACTIVATION>;
    }
  };
}

}  // namespace

int sgf_cuda_row_squares(sgf_matrix h, sgf_matrix sumsq, int dtype, uintptr_t stream) {
  if (h.data == nullptr || sumsq.data == nullptr) return SGF_CUDA_BAD_ARGUMENT;
  if (const int status = check_prefill(h.rows, 1, h.columns, dtype, 1)) return status;
  if (const int status = sgf::check_operands({h}, sizeof(uint16_t))) return status;
  if (const int status = sgf::check_operands({sumsq}, sizeof(float))) return status;
  const dim3 grid(static_cast<unsigned>(ceil_div(h.rows, kSquaresRows)));
  return sgf::hopper::launch(dtype == SGF_BFLOAT16 ? row_squares<Bfloat16> : row_squares<Half>, {grid, kSquaresThreads},
                             stream, static_cast<const uint16_t*>(h.data), h.row_stride, h.rows, h.columns,
                             static_cast<float*>(sumsq.data));
}

int sgf_cuda_norm_linear_prefill_width(int M, int64_t scaled, int64_t unscaled, int K, int activation, int sms) {
  return choose_deal(M, static_cast<int>(scaled), static_cast<int>(unscaled), activation == SGF_SILU_GATE, steps_in(K),
                     sms, false)
      .width;
}

int sgf_cuda_norm_linear_prefill(sgf_matrix h, sgf_matrix weight, sgf_matrix bias, sgf_matrix sumsq, sgf_matrix y,
                                 int64_t unscaled, double eps, double full_width, int activation, int dtype, int width,
                                 int sms, uintptr_t stream) {
  const bool gated = activation == SGF_SILU_GATE;
  const int64_t scaled = weight.rows - unscaled;
  if (y.data == nullptr || scaled < 0 || unscaled < 0 || activation < SGF_NO_ACTIVATION || activation > SGF_SILU_GATE ||
      (gated && scaled % 2 != 0) || (scaled > 0 && sumsq.data == nullptr)) {
    return SGF_CUDA_BAD_ARGUMENT;
  }
  if (const int status = check_prefill(h.rows, weight.rows, h.columns, dtype, sms)) return status;
  Problem p{};
  p.M = static_cast<int>(h.rows), p.gated = gated;
  p.scaled = static_cast<int>(scaled), p.unscaled = static_cast<int>(unscaled);
  p.steps_first = p.steps = steps_in(static_cast<int>(h.columns));
  if (const int status = check_deal(p, {width, 1})) return status;
  if (const int status = check_copied(h)) return status;
  if (const int status = check_copied(weight)) return status;
  if (const int status = sgf::check_operands({bias, y}, sizeof(uint16_t))) return status;
  if (const int status = sgf::check_operands({sumsq}, sizeof(float))) return status;

  if (const int status = make_maps(p, 0, h, weight, width, dtype)) return status;
  const NormArguments arguments{static_cast<const uint16_t*>(bias.data),
                                static_cast<const float*>(sumsq.data),
                                static_cast<uint16_t*>(y.data),
                                y.row_stride,
                                static_cast<float>(eps),
                                static_cast<float>(1 / full_width)};
  const auto launch_of = [&](auto kernel_of) {
    return launch_prefill(kernel_of, p, {width, 1}, sms, stream, arguments);
  };
  return dtype == SGF_BFLOAT16 ? launch_of(kernel_of<Bfloat16>(activation)) : launch_of(kernel_of<Half>(activation));
}
