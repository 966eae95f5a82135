// residual_linear for M <= 16: h' = a W^T + b + shortcut(h), and each row's sum of squares of the rounded h'.
//
//        W [n, k]            S^T [n, d] (or V^T [n, r])         h' [M, n]
//     +-----------------+  +-----------+      one tile         +---------+
//     | 64 rows   ----->|  | --------> |  ------------------>  | 64 cols |  + b, + h, rounded; and of each row the
//     +-----------------+  +-----------+                       +---------+  sum of squares, one per tile
//       chunks 0 .. C1-1     chunks C1 .. C1+C2-1
//
// The shortcut is a second operand pair whose chunks follow the first one's: same accumulators, same splits, no kernel
// of its own. S is read as it lies, along k or along n (decode.h). The block that finishes a tile writes it and leaves
// its rows' squares in the workspace; the last tile of all to be finished adds those in the tiles' order.
//
//     Waves  264 blocks at once on 132 SMs. n = 3072 or 2872 is 48 or 45 tiles in 4 splits: 192 or 180 blocks at once
//     Bytes  2 n (k + d)
//     FLOPs  2 n (k + d) times M rounded up to 8 or 16
//     Floor  at n=3072, k=11008, dense S, one H200 (4.3 TB/s copy): 20.1 us
//     Share  not yet measured; predicted 0.9, and 0.8 at k=4096 (10.2 us): 2 us to start, add up and add the squares
#include "cuda/decode.cuh"

namespace {

using namespace sgf::decode;

struct Arguments {
  Matrix a, weight, a2, weight2, residual;
  const uint16_t* bias;
  uint16_t* y;
  float* sumsq;
  int64_t stride_y, n;
  int M, K, K2;
  bool weight2_along_n;
  float* squares;  // [tiles][padded rows], after the shares
  float* workspace;
  int32_t* counters;  // one per tile, and the last one for all tiles
};

// sumsq[m] = the tiles' sums for that row, in an order that depends on their number alone.
template <int kColumns>
__device__ void add_squares(const float* squares, int64_t tiles, int M, float* sumsq) {
  constexpr int kLanes = kThreads / kMaxRows;
  const int m = threadIdx.x / kLanes;
  float total = 0;
  if (m < M) {
    for (int64_t tile = threadIdx.x % kLanes; tile < tiles; tile += kLanes)
      total += __ldcg(squares + tile * kColumns + m);
  }
#pragma unroll
  for (int apart = kLanes / 2; apart > 0; apart /= 2) total += __shfl_xor_sync(0xffffffff, total, apart);
  if (m < M && threadIdx.x % kLanes == 0) sumsq[m] = total;
}

template <class Element, int kColumns>
__global__ __launch_bounds__(kThreads, kBlocksPerSm) void residual_linear_decode(Arguments p) {
  __shared__ Shared<kColumns> shared;
  __shared__ float squares[kTileRows / 32][kColumns];  // of each warp's columns
  const int64_t tile = blockIdx.x;
  const int chunks1 = chunks_in(p.K);
  const Chunks chunks = chunks_of(chunks1 + chunks_in(p.K2), blockIdx.y, gridDim.y);
  const Chunks first = before(chunks, chunks1), second = after(chunks, chunks1);
  const Lane lane = lane_of(threadIdx.x % 32);
  const KMajor weight = runs_of(p.weight, p.n, p.K, tile, lane);

  const auto with_weight2 = [&](auto use) {
    if (p.weight2_along_n) {
      use(columns_of(p.weight2, p.n, p.K2, tile, lane));
    } else {
      use(runs_of(p.weight2, p.n, p.K2, tile, lane));
    }
  };

  sgf::let_next_start();
  prefetch(weight, first);
  with_weight2([&](const auto& weight2) { prefetch(weight2, second); });
  sgf::wait_for_previous();

  Sums<kColumns> sums{};
  const Activations a = activations_of(p.a, p.M, p.K, lane);
  stream<Element>(weight, p.weight.vectors, a, first, false, sums);
  if (second.first < second.last) {
    const Activations a2 = activations_of(p.a2, p.M, p.K2, lane);
    with_weight2([&](const auto& weight2) { stream<Element>(weight2, p.weight2.vectors, a2, second, false, sums); });
  }

  // What the end needs comes while the tile is added up.
  const int slot = own_slot(threadIdx.x);
  const int64_t column = tile * kTileRows + slot;
  const float bias = p.bias != nullptr && column < p.n ? Element::widen(p.bias[column]) : 0;
  float residual[own_rows(kColumns)];
#pragma unroll
  for (int j = 0; j < own_rows(kColumns); ++j) {
    const int m = own_row(threadIdx.x, j);
    const bool there = p.residual.data != nullptr && m < p.M && column < p.n;
    residual[j] = there ? Element::widen(p.residual.data[m * p.residual.stride + column]) : 0;
  }
  if (!add_up(sums, runs_slot, p.M, shared, p.workspace, p.counters)) return;

#pragma unroll
  for (int j = 0; j < own_rows(kColumns); ++j) {
    const int m = own_row(threadIdx.x, j);
    float square = 0;
    if (m < p.M && column < p.n) {
      const uint16_t rounded = Element::round(shared.share[0][cell_of(m, slot)] + bias + residual[j]);
      p.y[m * p.stride_y + column] = rounded;
      square = Element::widen(rounded) * Element::widen(rounded);
    }
    // A row's 64 columns are two warps.
#pragma unroll
    for (int apart = 16; apart > 0; apart /= 2) square += __shfl_xor_sync(0xffffffff, square, apart);
    if (threadIdx.x % 32 == 0) squares[slot / 32][m] = square;
  }
  __syncthreads();
  if (threadIdx.x < p.M) {
    p.squares[tile * kColumns + threadIdx.x] = squares[0][threadIdx.x] + squares[1][threadIdx.x];
  }
  if (!sgf::arrives_last(p.counters + gridDim.x, gridDim.x)) return;
  add_squares<kColumns>(p.squares, gridDim.x, p.M, p.sumsq);
}

// [dtype is bf16][more than 8 rows]
constexpr void (*kKernels[2][2])(Arguments) = {
    {residual_linear_decode<Half, 8>, residual_linear_decode<Half, 16>},
    {residual_linear_decode<Bfloat16, 8>, residual_linear_decode<Bfloat16, 16>}};

int64_t workspace_cells(int64_t tiles, int splits, int M) {
  return shares_cells(tiles, splits, M) + tiles * padded_rows(M);
}

}  // namespace

sgf_cuda_plan sgf_cuda_residual_linear_plan(int M, int64_t n, int K, int K2, int sms) {
  const int64_t tiles = ceil_div(n, kTileRows);
  const int splits = choose_splits(tiles, chunks_in(K) + chunks_in(K2), M, sms);
  return {splits, workspace_cells(tiles, splits, M), tiles + 1};
}

int sgf_cuda_residual_linear(const void* a, int64_t stride_a, const void* weight, int64_t stride_weight, const void* a2,
                             int64_t stride_a2, const void* weight2, int64_t stride_weight2, int weight2_along_n,
                             const void* bias, const void* residual, int64_t stride_residual, void* y, int64_t stride_y,
                             float* sumsq, int M, int64_t n, int K, int K2, int dtype, sgf_cuda_plan plan,
                             float* workspace, int32_t* counters, void* stream) {
  const int64_t tiles = ceil_div(n, kTileRows);
  if (const int status = check_decode(M, tiles, K, dtype, plan, workspace_cells(tiles, plan.splits, M), tiles + 1,
                                      workspace, counters)) {
    return status;
  }
  if (a == nullptr || weight == nullptr || y == nullptr || sumsq == nullptr || K2 < 0 || K2 > kMaxWidth ||
      (K2 > 0 && (a2 == nullptr || weight2 == nullptr))) {
    return SGF_CUDA_BAD_ARGUMENT;
  }
  if (const int status = sgf::check_pointers({a, weight, a2, weight2, bias, residual, y}, sizeof(uint16_t))) {
    return status;
  }
  if (const int status = sgf::check_pointers({sumsq, counters}, sizeof(float))) return status;
  if (const int status = sgf::check_pointers({workspace}, sizeof(float4))) return status;
  const bool along_n = weight2_along_n != 0;
  const Arguments arguments{matrix(a, stride_a, M, K),
                            matrix(weight, stride_weight, n, K),
                            matrix(a2, stride_a2, M, K2),
                            matrix(weight2, stride_weight2, along_n ? K2 : n, along_n ? n : K2),
                            matrix(residual, stride_residual, M, n),
                            static_cast<const uint16_t*>(bias),
                            static_cast<uint16_t*>(y),
                            sumsq,
                            stride_y,
                            n,
                            M,
                            K,
                            K2,
                            along_n,
                            workspace + shares_cells(tiles, plan.splits, M),
                            workspace,
                            counters};
  return launch_decode(kKernels[dtype == SGF_BFLOAT16][M > 8], tiles, plan, stream, arguments);
}
