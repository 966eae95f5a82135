// norm_linear for M <= 16: y = act(rsqrt(sumsq / D + eps) * (h W^T) + b), and plain h W^T for the unscaled rows of W.
//
//       W [n, d]                           y [M, n]
//     +-----------------+    one tile     +---------+
//     | 64 rows         | --------------> | 64 cols |   plain
//     +-----------------+                 +---------+
//     | 32 gate rows    | --+             +---------+
//     | ...             |   +-----------> | 32 cols |   silu_gate: a lane holds gate j and up j in one fragment
//     | 32 up rows      | --+             +---------+
//     +-----------------+
//
// Block (tile, split) streams its rows of W over its share of d, as decode.cuh draws it; the block that finishes a tile
// scales, adds the bias and activates. Where sumsq is not given every block sums the squares of the h that pass by.
//
//     Waves  264 blocks at once on 132 SMs. A sliced Llama-2-7B: n = 9216 or 12288 is 144 or 192 tiles, unsplit, all at
//            once; n = 22016 is 344 tiles in 2 splits, 264 + 264 + 160 blocks
//     Bytes  2 n d
//     FLOPs  2 n d times M rounded up to 8 or 16: at the memory's speed, 34 or 69 TFLOP/s of tensor cores
//     Floor  at n=12288, d=3072, one H200 (4.3 TB/s copy): 17.6 us
//     Share  not yet measured; predicted 0.9, the rest being 2 us to start and to add up
#include "cuda/activation.h"
#include "cuda/decode.cuh"

namespace {

using namespace sgf::decode;

struct Arguments {
  Matrix h, weight;
  const uint16_t* bias;
  const float* sumsq;
  uint16_t* y;
  int64_t stride_y, scaled, unscaled;
  int M, K, activation;
  float eps, inverse_width;
  float* workspace;
  int32_t* counters;
};

template <class Element, int kColumns>
__global__ __launch_bounds__(kThreads, kBlocksPerSm) void norm_linear_decode(Arguments p) {
  __shared__ Shared<kColumns> shared;
  const bool gated = p.activation == SGF_SILU_GATE;
  const NormTile tile = norm_tile(blockIdx.x, p.scaled, p.unscaled, gated);
  const Chunks chunks = chunks_of(chunks_in(p.K), blockIdx.y, gridDim.y);
  const Lane lane = lane_of(threadIdx.x % 32);
  const KMajor weight = halves_of(p.weight, p.K, tile, lane);

  sgf::let_next_start();
  prefetch(weight, chunks);
  sgf::wait_for_previous();

  Sums<kColumns> sums{};
  const Activations h = activations_of(p.h, p.M, p.K, lane);
  stream<Element>(weight, p.weight.vectors, h, chunks, p.sumsq == nullptr, sums);

  // What the end needs comes while the tile is added up.
  const int slot = own_slot(threadIdx.x), index = slot % kHalfRows;
  const bool upper = slot >= kHalfRows, paired = gated && tile.scaled;
  const bool finishes = index < (upper ? tile.count[1] : tile.count[0]) && !(paired && upper);  // a gate takes its up
  const bool biased = finishes && tile.scaled && p.bias != nullptr;
  const float bias = biased ? Element::widen(p.bias[(upper ? tile.first[1] : tile.first[0]) + index]) : 0;
  const float up_bias = biased && paired ? Element::widen(p.bias[tile.first[1] + index]) : 0;
  float sumsq[own_rows(kColumns)];
#pragma unroll
  for (int j = 0; j < own_rows(kColumns); ++j) {
    const int m = own_row(threadIdx.x, j);
    sumsq[j] = m < p.M && p.sumsq != nullptr ? p.sumsq[m] : 0;
  }
  if (!add_up(sums, halves_slot, p.M, shared, p.workspace, p.counters) || !finishes) return;

  const float* total = shared.share[0];
#pragma unroll
  for (int j = 0; j < own_rows(kColumns); ++j) {
    const int m = own_row(threadIdx.x, j);
    if (m >= p.M) return;
    float value = total[cell_of(m, slot)];
    if (tile.scaled) {
      if (p.sumsq == nullptr) sumsq[j] = total[cell_of(m, kSquare)];
      const float scale = rsqrtf(sumsq[j] * p.inverse_width + p.eps);
      value = sgf::activate(value * scale + bias, p.activation);
      if (paired) value *= total[cell_of(m, slot + kHalfRows)] * scale + up_bias;
    }
    p.y[m * p.stride_y + tile.column + slot] = Element::round(value);
  }
}

// [dtype is bf16][more than 8 rows]
constexpr void (*kKernels[2][2])(Arguments) = {{norm_linear_decode<Half, 8>, norm_linear_decode<Half, 16>},
                                               {norm_linear_decode<Bfloat16, 8>, norm_linear_decode<Bfloat16, 16>}};

}  // namespace

sgf_cuda_plan sgf_cuda_norm_linear_plan(int M, int64_t scaled, int64_t unscaled, int K, int activation, int sms) {
  const int64_t tiles = norm_tiles(scaled, unscaled, activation == SGF_SILU_GATE);
  const int splits = choose_splits(tiles, chunks_in(K), M, sms);
  return {splits, shares_cells(tiles, splits, M), splits > 1 ? tiles : 0};
}

int sgf_cuda_norm_linear(sgf_matrix h, sgf_matrix weight, sgf_matrix bias, sgf_matrix sumsq, sgf_matrix y,
                         int64_t unscaled, double eps, double full_width, int activation, int dtype, int splits,
                         sgf_matrix workspace, sgf_matrix counters, uintptr_t stream) {
  const int64_t scaled = weight.rows - unscaled, tiles = norm_tiles(scaled, unscaled, activation == SGF_SILU_GATE);
  if (const int status = check_decode(h, tiles, dtype, splits)) return status;
  if (h.data == nullptr || weight.data == nullptr || y.data == nullptr || scaled < 0 || unscaled < 0 ||
      activation < SGF_NO_ACTIVATION || activation > SGF_SILU_GATE ||
      (activation == SGF_SILU_GATE && scaled % 2 != 0)) {
    return SGF_CUDA_BAD_ARGUMENT;
  }
  const int M = static_cast<int>(h.rows), K = static_cast<int>(h.columns);
  if (const int status = check_cells(workspace, shares_cells(tiles, splits, M), counters, splits > 1 ? tiles : 0)) {
    return status;
  }
  if (const int status = sgf::check_operands({h, weight, bias, y}, sizeof(uint16_t))) return status;
  if (const int status = sgf::check_operands({sumsq}, sizeof(float))) return status;
  const Arguments arguments{rows_of(h),
                            rows_of(weight),
                            static_cast<const uint16_t*>(bias.data),
                            static_cast<const float*>(sumsq.data),
                            static_cast<uint16_t*>(y.data),
                            y.row_stride,
                            scaled,
                            unscaled,
                            M,
                            K,
                            activation,
                            static_cast<float>(eps),
                            static_cast<float>(1 / full_width),
                            static_cast<float*>(workspace.data),
                            static_cast<int32_t*>(counters.data)};
  return launch_decode(kKernels[dtype == SGF_BFLOAT16][M > 8], tiles, splits, stream, arguments);
}
