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

int sgf_cuda_residual_linear(sgf_matrix a, sgf_matrix weight, sgf_matrix bias, sgf_matrix residual, sgf_matrix a2,
                             sgf_matrix weight2, sgf_matrix y, sgf_matrix sumsq, int dtype, int splits,
                             sgf_matrix workspace, sgf_matrix counters, uintptr_t stream) {
  const int64_t n = weight.rows, tiles = ceil_div(n, kTileRows);
  if (const int status = check_decode(a, tiles, dtype, splits)) return status;
  if (a.data == nullptr || weight.data == nullptr || y.data == nullptr || sumsq.data == nullptr || a2.columns < 0 ||
      a2.columns > kMaxWidth || (a2.columns > 0 && (a2.data == nullptr || weight2.data == nullptr))) {
    return SGF_CUDA_BAD_ARGUMENT;
  }
  const int M = static_cast<int>(a.rows), K = static_cast<int>(a.columns), K2 = static_cast<int>(a2.columns);
  if (const int status = check_cells(workspace, workspace_cells(tiles, splits, M), counters, tiles + 1)) return status;
  if (const int status = sgf::check_operands({a, weight, bias, residual, a2, weight2, y}, sizeof(uint16_t))) {
    return status;
  }
  if (const int status = sgf::check_operands({sumsq}, sizeof(float))) return status;
  const bool along_n = sgf::has_rows(weight2);
  float* const shares = static_cast<float*>(workspace.data);
  const Arguments arguments{rows_of(a),
                            rows_of(weight),
                            rows_of(a2),
                            rows_of(along_n ? weight2 : sgf::transposed(weight2)),
                            rows_of(residual),
                            static_cast<const uint16_t*>(bias.data),
                            static_cast<uint16_t*>(y.data),
                            static_cast<float*>(sumsq.data),
                            y.row_stride,
                            n,
                            M,
                            K,
                            K2,
                            along_n,
                            shares + shares_cells(tiles, splits, M),
                            shares,
                            static_cast<int32_t*>(counters.data)};
  return launch_decode(kKernels[dtype == SGF_BFLOAT16][M > 8], tiles, splits, stream, arguments);
}
