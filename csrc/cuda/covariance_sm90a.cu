// covariance_ on Hopper: acc += X^T X for tall X [N, D] in fp16 or bf16, one triangle, added to acc in fp64.
//
//     acc [D, D], 256 x 192 per cluster        X [N, D]
//     +------+                                 +----------------+
//     | 0  1 |                                 |    split 0     |   all tiles of split 0 first: clusters that run
//     +------+--+                              +----------------+   together read the same tokens, which stay in L2
//     | 2  3  4 |  block = 128 of the rows     |    split 1     |
//     +---------+--+                           +----------------+
//
// 1. prepare: only where rows are scaled, masked or not aligned for the copy engine. Writes planes [N, D]: X itself, or
//    with a row scale s three: p x, and q x as the sum of two 16-bit terms, with s^2 = p q and p the power of two in s
//    (p x is exact; rounding s^2 x to 16 bits would cost 1e-4). Then X^T diag(s^2) X takes two passes over the tokens.
// 2. partial_tiles: cluster (tile, split). One warpgroup's first thread keeps the copy engine five steps of 64 tokens
//    ahead; two warpgroups of tensor cores, 64 x 192 each, read both operands along M and N, as they lie. A chain of
//    256 tokens (fp16: 128) ends in a second set of fp32 accumulators.
// 3. reduce_mirror: adds the splits in order in fp64, then acc's old value, and writes both halves. Same inputs, same
//    bits.
//
//     FLOPs  N D (D + 390): half of a full matmul, and the tiles' overhang over the diagonal, which leaves 1.83 of the
//            triangle's 2 times at D = 4096; twice that with a row scale
//     Bytes  2 N D once while a split's tokens stay in L2; 2.2 D^2 written and read per split at D = 4096; 12 D^2 of
//            acc in fp64
//     L2     28 KB per block and step of 768 clocks of MMA
//     Floor  at N=65536, D=4096, bf16, one H200 (780 TFLOP/s): 1.54 ms
//     Share  not yet measured
#include "cuda/covariance.h"
#include "cuda/element.cuh"
#include "cuda/hopper.cuh"

namespace {

using namespace sgf::covariance;
using namespace sgf::hopper;
using namespace sgf;

constexpr int kStages = 5;
constexpr int kThreads = 3 * 128;
constexpr int kSharedBytes = kStages * kStepBytes + 1024;  // the swizzle wants 1024-byte alignment

// Steps are (token, pass), the passes of a token together: the left operand is plane 0, the right one `first_plane` and
// the ones after it.
template <bool kBfloat16>
__global__ __launch_bounds__(kThreads, 1) void partial_tiles(const __grid_constant__ CUtensorMap map, int64_t N,
                                                             int64_t D, int64_t tokens, int passes, int first_plane,
                                                             float* workspace) {
  __shared__ uint64_t full[kStages], empty[kStages];
  const uint32_t stages = (shared_address(dynamic_shared()) + 1023) / 1024 * 1024;
  const int rank = blockIdx.x % kRanks;  // the cluster is one-dimensional and starts at a multiple of kRanks
  const int64_t tile_number = blockIdx.x / kRanks, split = blockIdx.y;
  const Tile tile = tile_at(tile_number, D);
  const int64_t first = split * tokens, last = first + tokens < N ? first + tokens : N;
  const int steps = static_cast<int>(ceil_div(last - first, kStep)) * passes;

  wait_for_previous();
  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) {
      init(shared_address(full + s), 1);
      // One arrival per warp of tensor cores, of both ranks: both write into this block's stages.
      init(shared_address(empty + s), 8 * kRanks);
    }
    show_barriers();
  }
  __syncthreads();
  cluster_sync();

  const int group = threadIdx.x / 128;
  if (group == 2) {
    give_registers_back<40>();
    if (threadIdx.x % 128 == 0) {
      for (int step = 0; step < steps; ++step) {
        const int s = step % kStages;
        const uint32_t barrier = shared_address(full + s);
        wait(shared_address(empty + s), (step / kStages + 1) % 2);  // of the first round there is nothing to wait for
        arrive_and_expect(barrier, kStepBytes);
        for (int b = 0; b < kBoxes; ++b) {
          const Box box = box_of(b, rank, tile);
          const int64_t token = first + step / passes * kStep + box.token;
          copy_box(&map, static_cast<int>(box.column), static_cast<int>(token),
                   box.shared ? first_plane + step % passes : 0, stages + s * kStepBytes + box.offset, barrier,
                   box.shared);
        }
      }
    }
    __syncwarp();
  } else {
    take_registers<232>();
    float total[96], chain[96];
#pragma unroll
    for (int c = 0; c < 96; ++c) total[c] = chain[c] = 0;
    for (int step = 0; step < steps; ++step) {
      const int s = step % kStages;
      const uint32_t stage = stages + s * kStepBytes;
      wait(shared_address(full + s), step / kStages % 2);
      pin(chain);
      fence();
#pragma unroll
      for (int k = 0; k < kStep / 16; ++k) {
        wgmma<kBfloat16, true, true>(chain, operand(stage + group * kBlockBytes + k * kSixteenRows),
                                     operand(stage + kColumnsOffset + k * kSixteenRows),
                                     k > 0 || step % kChain<kBfloat16> > 0);
      }
      commit();
      wait_for_tensor_cores<0>();
      pin(chain);
      if (threadIdx.x % 32 < kRanks) arrive(shared_address(empty + s), threadIdx.x % 32);
      __syncwarp();
      if (step % kChain<kBfloat16> == kChain<kBfloat16> - 1 || step == steps - 1) {
#pragma unroll
        for (int c = 0; c < 96; ++c) total[c] += chain[c];
      }
    }
    const int thread = threadIdx.x % 128;
    float* cells = workspace + split * share_cells(D) + (tile_number * kRanks + rank) * kCells;
#pragma unroll
    for (int c = 0; c < 96; c += 2) {
      float* cell = cells + (group * 64 + accumulator_row(thread, c)) * kTileColumns + accumulator_column(thread, c);
      *reinterpret_cast<float2*>(cell) = make_float2(total[c], total[c + 1]);
    }
  }
  cluster_sync();  // the other block may still be writing into this one's shared memory
}

// One block per token.
template <class Element>
__global__ void prepare(const uint16_t* x, int64_t stride, int64_t N, int64_t D, const float* row_scale,
                        const uint8_t* mask, uint16_t* planes, int64_t pitch) {
  wait_for_previous();
  const int64_t token = blockIdx.x;
  const bool counts = mask == nullptr || mask[token] != 0;
  const float s = row_scale == nullptr ? 1 : row_scale[token];
  const float p = __int_as_float(__float_as_int(s) & 0x7f800000), q = s * (s / (p > 0 ? p : 1));
  for (int64_t column = threadIdx.x; column < D; column += blockDim.x) {
    const uint16_t value = counts ? x[token * stride + column] : 0;
    uint16_t* cell = planes + token * pitch + column;
    if (row_scale == nullptr) {
      *cell = value;
      continue;
    }
    const float scaled = counts ? Element::widen(value) * q : 0;
    const uint16_t high = Element::round(scaled);
    cell[0] = Element::round(counts ? Element::widen(value) * p : 0);
    cell[N * pitch] = high;
    cell[2 * N * pitch] = Element::round(scaled - Element::widen(high));
  }
}

constexpr int kPiece = 32;
constexpr int kPieceRows = 8;  // threads along the rows of a piece

// A block owns a 32 x 32 piece of the lower triangle and its mirror image. A split's share of the workspace has
// `share_size` cells: counting the tiles takes a loop, which the host runs once.
template <class Real>
__global__ void reduce_mirror(const float* workspace, int splits, int64_t share_size, Real* acc, int64_t D,
                              int64_t stride_row, int64_t stride_column) {
  wait_for_previous();
  if (blockIdx.x > blockIdx.y) return;
  __shared__ Real piece[kPiece][kPiece + 1];
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kPiece, row = static_cast<int64_t>(blockIdx.y) * kPiece;
  const float* cells = workspace + cell_of(row, column, D);  // of one tile: 32 divides its rows and its columns
  for (int y = threadIdx.y; y < kPiece; y += kPieceRows) {
    const int64_t r = row + y, c = column + threadIdx.x;
    if (r >= D || c > r) continue;
    const float* share = cells + y * kTileColumns + threadIdx.x;
    double total = 0;
    for (int split = 0; split < splits; ++split) total += share[split * share_size];
    Real* to = acc + r * stride_row + c * stride_column;
    *to = piece[y][threadIdx.x] = static_cast<Real>(static_cast<double>(*to) + total);
  }
  __syncthreads();
  for (int y = threadIdx.y; y < kPiece; y += kPieceRows) {
    const int64_t r = row + threadIdx.x, c = column + y;
    if (r < D && c < r) acc[c * stride_row + r * stride_column] = piece[threadIdx.x][y];
  }
}

template <class Element>
int prepare_planes(const sgf_matrix& x, const float* row_scale, const uint8_t* mask, void* planes, int64_t pitch,
                   uintptr_t stream) {
  return hopper::launch(prepare<Element>, {static_cast<unsigned>(x.rows), 256}, stream,
                        static_cast<const uint16_t*>(x.data), x.row_stride, x.rows, x.columns, row_scale, mask,
                        static_cast<uint16_t*>(planes), pitch);
}

template <class Real>
int add_to(const sgf_matrix& acc, const float* workspace, int splits, uintptr_t stream) {
  const auto pieces = static_cast<unsigned>(ceil_div(acc.rows, kPiece));
  const dim3 grid(pieces, pieces), threads(kPiece, kPieceRows);
  return hopper::launch(reduce_mirror<Real>, {grid, threads}, stream, workspace, splits, share_cells(acc.rows),
                        static_cast<Real*>(acc.data), acc.rows, acc.row_stride, acc.column_stride);
}

}  // namespace

sgf_cuda_plan sgf_cuda_covariance_plan(int64_t N, int64_t D, int sms) {
  const int splits = choose_splits(N, D, sms);
  return {splits, splits * share_cells(D), 0};
}

int sgf_cuda_covariance(sgf_matrix acc, sgf_matrix x, sgf_matrix row_scale, sgf_matrix mask, int acc_dtype, int dtype,
                        int splits, sgf_matrix planes, sgf_matrix workspace, uintptr_t stream) {
  const int64_t N = x.rows, D = x.columns;
  const bool scaled = row_scale.data != nullptr, prepared = planes.data != nullptr;
  if (x.data == nullptr || acc.data == nullptr || N < 1 || N > INT32_MAX / 2 || D < 1 || D > INT32_MAX / 2 ||
      splits < 1 || (dtype != SGF_FLOAT16 && dtype != SGF_BFLOAT16) ||
      (acc_dtype != SGF_FLOAT32 && acc_dtype != SGF_FLOAT64) || (!prepared && (scaled || mask.data != nullptr))) {
    return SGF_CUDA_BAD_ARGUMENT;
  }
  if (workspace.columns < splits * share_cells(D)) return SGF_CUDA_WORKSPACE;
  if (!prepared && (x.row_stride % 8 != 0 || x.row_stride < D)) return SGF_CUDA_MISALIGNED;
  if (const int status = check_operands({prepared ? planes : x, workspace}, 16)) return status;
  if (const int status = check_operands({x, row_scale, mask, acc}, 1)) return status;

  const int64_t pitch = prepared ? ceil_div(D, 8) * 8 : x.row_stride;
  if (prepared) {
    const auto prepare = dtype == SGF_BFLOAT16 ? prepare_planes<Bfloat16> : prepare_planes<Half>;
    if (const int status = prepare(x, static_cast<const float*>(row_scale.data), static_cast<const uint8_t*>(mask.data),
                                   planes.data, pitch, stream)) {
      return status;
    }
  }
  CUtensorMap map;
  if (const int status = make_map(prepared ? planes.data : x.data, {D, N, scaled ? 3 : 1}, {pitch, N * pitch},
                                  kBoxTokens, dtype, &map)) {
    return status;
  }
  float* const shares = static_cast<float*>(workspace.data);
  const auto tiles = dtype == SGF_BFLOAT16 ? partial_tiles<true> : partial_tiles<false>;
  const dim3 grid(static_cast<unsigned>(tiles_of(D) * kRanks), static_cast<unsigned>(splits));
  if (const int status = hopper::launch(tiles, {grid, kThreads, kSharedBytes, kRanks}, stream, map, N, D,
                                        split_tokens(N, splits), scaled ? 2 : 1, scaled ? 1 : 0, shares)) {
    return status;
  }
  const auto add = acc_dtype == SGF_FLOAT64 ? add_to<double> : add_to<float>;
  return add(acc, shares, splits, stream);
}
