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
//     Bytes  2 n d
//     FLOPs  2 n d times M rounded up to 8 or 16: at the memory's speed, 34 or 69 TFLOP/s of tensor cores
//     Floor  at n=12288, d=3072, one H200 (4.3 TB/s copy): 17.6 us
//     Share  not yet measured
#include "cuda/decode.cuh"

namespace {

using namespace sgf::decode;

struct Arguments {
  const uint16_t* h;
  const uint16_t* weight;
  const uint16_t* bias;
  const float* sumsq;
  uint16_t* y;
  int64_t stride_h, stride_weight, stride_y, scaled, unscaled;
  int M, K, activation;
  float eps, inverse_width;
  float* workspace;
  int32_t* counters;
};

__device__ float activate(float x, int activation) {
  switch (activation) {
    case SGF_RELU:
      return x < 0 ? 0 : x;  // not fmaxf, which would lose a NaN
    case SGF_GELU:
      return 0.5f * x * (1 + erff(x * 0.70710678f));
    case SGF_GELU_TANH:
      return 0.5f * x * (1 + tanhf(0.79788456f * (x + 0.044715f * x * x * x)));
    case SGF_SILU_GATE:
      return x / (1 + expf(-x));
  }
  return x;
}

template <class Element, int kColumns, bool kAligned>
__global__ __launch_bounds__(kThreads, kBlocksPerSm) void norm_linear_decode(Arguments p) {
  __shared__ Shared<kColumns> shared;
  const bool gated = p.activation == SGF_SILU_GATE;
  const NormTile tile = norm_tile(blockIdx.x, p.scaled, p.unscaled, gated);
  const Chunks chunks = chunks_of(chunks_in(p.K), blockIdx.y, gridDim.y);
  const Lane lane = lane_of(threadIdx.x % 32);
  const KMajor weight = halves_of(p.weight, p.stride_weight, p.K, tile, lane);

  sgf::let_next_start();
  prefetch(weight, chunks);
  sgf::wait_for_previous();

  Sums<kColumns> sums{};
  const Activations h = activations_of(p.h, p.stride_h, p.M, p.K, lane);
  stream<Element, kColumns, kAligned>(weight, h, chunks, p.sumsq == nullptr, sums);
  if (!add_up(sums, halves_slot, shared, p.workspace, p.counters)) return;

  const int slot = threadIdx.x % kTileRows, index = slot % kHalfRows;
  const bool upper = slot >= kHalfRows, paired = gated && tile.scaled;
  if (index >= (upper ? tile.count[1] : tile.count[0]) || (paired && upper)) return;  // a gate takes its up along
  const int64_t row = upper ? tile.first[1] + index : tile.first[0] + index;
  for (int m = threadIdx.x / kTileRows; m < p.M; m += kThreads / kTileRows) {
    float value = shared.tile[0][m][slot];
    if (tile.scaled) {
      const float scale = rsqrtf((p.sumsq == nullptr ? shared.square[0][m] : p.sumsq[m]) * p.inverse_width + p.eps);
      value *= scale;
      if (p.bias != nullptr) value += Element::widen(p.bias[row]);
      value = activate(value, p.activation);
      if (paired) {
        float up = shared.tile[0][m][slot + kHalfRows] * scale;
        if (p.bias != nullptr) up += Element::widen(p.bias[tile.first[1] + index]);
        value *= up;
      }
    }
    p.y[m * p.stride_y + tile.column + slot] = Element::round(value);
  }
}

// [dtype is bf16][more than 8 rows][rows of 16-byte vectors]
constexpr void (*kKernels[2][2][2])(Arguments) = {
    {{norm_linear_decode<Half, 8, false>, norm_linear_decode<Half, 8, true>},
     {norm_linear_decode<Half, 16, false>, norm_linear_decode<Half, 16, true>}},
    {{norm_linear_decode<Bfloat16, 8, false>, norm_linear_decode<Bfloat16, 8, true>},
     {norm_linear_decode<Bfloat16, 16, false>, norm_linear_decode<Bfloat16, 16, true>}},
};

}  // namespace

sgf_cuda_plan sgf_cuda_norm_linear_plan(int M, int64_t scaled, int64_t unscaled, int K, int activation, int sms) {
  const int64_t tiles = norm_tiles(scaled, unscaled, activation == SGF_SILU_GATE);
  const int splits = choose_splits(tiles, chunks_in(K), sms);
  return {splits, shares_cells(tiles, splits, M), splits > 1 ? tiles : 0};
}

int sgf_cuda_norm_linear(const void* h, int64_t stride_h, const void* weight, int64_t stride_weight, const void* bias,
                         const float* sumsq, void* y, int64_t stride_y, int M, int64_t scaled, int64_t unscaled, int K,
                         float eps, float inverse_width, int activation, int dtype, sgf_cuda_plan plan,
                         float* workspace, int32_t* counters, void* stream) {
  const int64_t tiles = norm_tiles(scaled, unscaled, activation == SGF_SILU_GATE);
  if (const int status = check_decode(M, tiles, K, dtype, plan, shares_cells(tiles, plan.splits, M),
                                      plan.splits > 1 ? tiles : 0, workspace, counters)) {
    return status;
  }
  if (h == nullptr || weight == nullptr || y == nullptr || scaled < 0 || unscaled < 0 ||
      activation < SGF_NO_ACTIVATION || activation > SGF_SILU_GATE ||
      (activation == SGF_SILU_GATE && scaled % 2 != 0)) {
    return SGF_CUDA_BAD_ARGUMENT;
  }
  if (const int status = sgf::check_pointers({h, weight, bias, y}, sizeof(uint16_t))) return status;
  if (const int status = sgf::check_pointers({sumsq, workspace, counters}, sizeof(float))) return status;
  const bool aligned = vectors(h, stride_h, K) && vectors(weight, stride_weight, K);
  const Arguments arguments{static_cast<const uint16_t*>(h),
                            static_cast<const uint16_t*>(weight),
                            static_cast<const uint16_t*>(bias),
                            sumsq,
                            static_cast<uint16_t*>(y),
                            stride_h,
                            stride_weight,
                            stride_y,
                            scaled,
                            unscaled,
                            M,
                            K,
                            activation,
                            eps,
                            inverse_width,
                            workspace,
                            counters};
  return sgf::launch(kKernels[dtype == SGF_BFLOAT16][M > 8][aligned], decode_grid(tiles, plan), kThreads, stream,
                     arguments);
}
