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
//    256 tokens ends in a second set of fp32 accumulators.
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
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/covariance.h"
#include "cuda/launch.cuh"

namespace {

using namespace sgf::covariance;

constexpr int kStages = 5;
constexpr int kThreads = 3 * 128;
constexpr int kSharedBytes = kStages * kStepBytes + 1024;  // the swizzle wants 1024-byte alignment

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

__device__ __forceinline__ void wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{ .reg .pred done;\n\t"
      "again: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n\t"
      "@!done bra again; }" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// Arrives at the barrier that stands at this address in the block with this rank.
__device__ __forceinline__ void arrive(uint32_t barrier, int rank) {
  asm volatile(
      "{ .reg .b32 remote;\n\t"
      "mapa.shared::cluster.u32 remote, %0, %1;\n\t"
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [remote]; }" ::"r"(barrier),
      "r"(rank)
      : "memory");
}

__device__ __forceinline__ void copy_box(const CUtensorMap* map, const Box& box, int64_t token, int plane,
                                         uint32_t stage, uint32_t barrier) {
  const uint32_t to = stage + box.offset;
  const int column = static_cast<int>(box.column), row = static_cast<int>(token) + box.token;
  if (box.shared) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%0], [%1, {%2, %3, %4}], [%5], %6;" ::"r"(to),
        "l"(map), "r"(column), "r"(row), "r"(plane), "r"(barrier), "h"(static_cast<uint16_t>((1 << kRanks) - 1))
        : "memory");
  } else {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];" ::
            "r"(to),
        "l"(map), "r"(column), "r"(row), "r"(plane), "r"(barrier)
        : "memory");
  }
}

// d = a^T b, plus d where `add`: 64 x 192 over 16 tokens, both operands along M and N.
template <bool kBfloat16>
__device__ __forceinline__ void wgmma(float (&d)[96], uint64_t a, uint64_t b, int add) {
#define SGF_WGMMA(types)                                                                                            \
  asm volatile(                                                                                                     \
      "{ .reg .pred add;\n\tsetp.ne.b32 add, %98, 0;\n\t"                                                           \
      "wgmma.mma_async.sync.aligned.m64n192k16.f32." types                                                          \
      " {"                                                                                                          \
      "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,"                      \
      "%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,"            \
      "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63,%64,%65,%66,%67,%68,%69,%70,%71,"            \
      "%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"             \
      "}, %96, %97, add, 1, 1, 1, 1; }"                                                                             \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), \
        "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]),      \
        "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]),     \
        "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]),     \
        "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]),     \
        "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]),     \
        "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), "+f"(d[56]),     \
        "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63]), "+f"(d[64]),     \
        "+f"(d[65]), "+f"(d[66]), "+f"(d[67]), "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71]), "+f"(d[72]),     \
        "+f"(d[73]), "+f"(d[74]), "+f"(d[75]), "+f"(d[76]), "+f"(d[77]), "+f"(d[78]), "+f"(d[79]), "+f"(d[80]),     \
        "+f"(d[81]), "+f"(d[82]), "+f"(d[83]), "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87]), "+f"(d[88]),     \
        "+f"(d[89]), "+f"(d[90]), "+f"(d[91]), "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95])                   \
      : "l"(a), "l"(b), "r"(add))
  if constexpr (kBfloat16) {
    SGF_WGMMA("bf16.bf16");
  } else {
    SGF_WGMMA("f16.f16");
  }
#undef SGF_WGMMA
}

// Keeps what the compiler does with the accumulators on its side of this point: the wait for the tensor cores does not
// name them.
__device__ __forceinline__ void pin(float (&d)[96]) {
#pragma unroll
  for (int c = 0; c < 96; ++c) asm volatile("" : "+f"(d[c])::"memory");
}

// Steps are (token, pass), the passes of a token together: the left operand is plane 0, the right one `first_plane` and
// the ones after it.
template <bool kBfloat16>
__global__ __cluster_dims__(kRanks, 1, 1)
    __launch_bounds__(kThreads, 1) void partial_tiles(const __grid_constant__ CUtensorMap map, int64_t N, int64_t D,
                                                      int64_t tokens, int passes, int first_plane, float* workspace) {
  extern __shared__ uint8_t unaligned[];
  __shared__ uint64_t full[kStages], empty[kStages];
  const uint32_t stages = (shared_address(unaligned) + 1023) / 1024 * 1024;
  const int rank = blockIdx.x % kRanks;  // the cluster is one-dimensional and starts at a multiple of kRanks
  const int64_t tile_number = blockIdx.x / kRanks, split = blockIdx.y;
  const Tile tile = tile_at(tile_number, D);
  const int64_t first = split * tokens, last = first + tokens < N ? first + tokens : N;
  const int steps = static_cast<int>(ceil_div(last - first, kStep)) * passes;

  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) {
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(full + s)));
      // One arrival per warp of tensor cores, of both ranks: both write into this block's stages.
      asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(empty + s)), "r"(8 * kRanks));
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  cluster_sync();

  const int group = threadIdx.x / 128;
  if (group == 2) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x % 128 == 0) {
      for (int step = 0; step < steps; ++step) {
        const int s = step % kStages;
        const uint32_t barrier = shared_address(full + s);
        wait(shared_address(empty + s), (step / kStages + 1) % 2);  // of the first round there is nothing to wait for
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(kStepBytes)
                     : "memory");
        for (int b = 0; b < kBoxes; ++b) {
          const Box box = box_of(b, rank, tile);
          copy_box(&map, box, first + step / passes * kStep, box.shared ? first_plane + step % passes : 0,
                   stages + s * kStepBytes, barrier);
        }
      }
    }
    __syncwarp();
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    float total[96], chain[96];
#pragma unroll
    for (int c = 0; c < 96; ++c) total[c] = chain[c] = 0;
    for (int step = 0; step < steps; ++step) {
      const int s = step % kStages;
      const uint32_t stage = stages + s * kStepBytes;
      wait(shared_address(full + s), step / kStages % 2);
      pin(chain);
      asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
      for (int k = 0; k < kStep / 16; ++k) {
        wgmma<kBfloat16>(chain, descriptor(stage + group * kBlockBytes + k * kSixteenTokens),
                         descriptor(stage + kColumnsOffset + k * kSixteenTokens), k > 0 || step % kChain > 0);
      }
      asm volatile("wgmma.commit_group.sync.aligned;\n\twgmma.wait_group.sync.aligned 0;" ::: "memory");
      pin(chain);
      if (threadIdx.x % 32 < kRanks) arrive(shared_address(empty + s), threadIdx.x % 32);
      __syncwarp();
      if (step % kChain == kChain - 1 || step == steps - 1) {
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

__device__ float widen(__half x) { return __half2float(x); }
__device__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ void round_to(float x, __half& y) { y = __float2half_rn(x); }
__device__ void round_to(float x, __nv_bfloat16& y) { y = __float2bfloat16_rn(x); }

// One block per token.
template <class Element>
__global__ void prepare(const Element* x, int64_t stride, int64_t N, int64_t D, const float* row_scale,
                        const uint8_t* mask, Element* planes, int64_t pitch) {
  const int64_t token = blockIdx.x;
  const bool counts = mask == nullptr || mask[token] != 0;
  const float s = row_scale == nullptr ? 1 : row_scale[token];
  const float p = __int_as_float(__float_as_int(s) & 0x7f800000), q = s * (s / (p > 0 ? p : 1));
  for (int64_t column = threadIdx.x; column < D; column += blockDim.x) {
    const Element value = counts ? x[token * stride + column] : Element(0.0f);
    Element* cell = planes + token * pitch + column;
    if (row_scale == nullptr) {
      *cell = value;
      continue;
    }
    const float scaled = counts ? widen(value) * q : 0;
    Element high, low;
    round_to(counts ? widen(value) * p : 0, cell[0]);
    round_to(scaled, high);
    round_to(scaled - widen(high), low);
    cell[N * pitch] = high;
    cell[2 * N * pitch] = low;
  }
}

constexpr int kPiece = 32;
constexpr int kPieceRows = 8;  // threads along the rows of a piece

// A block owns a 32 x 32 piece of the lower triangle and its mirror image.
template <class Real>
__global__ void reduce_mirror(const float* workspace, int splits, Real* acc, int64_t D, int64_t stride_row,
                              int64_t stride_column) {
  if (blockIdx.x > blockIdx.y) return;
  __shared__ Real piece[kPiece][kPiece + 1];
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kPiece, row = static_cast<int64_t>(blockIdx.y) * kPiece;
  const float* cells = workspace + cell_of(row, column, D);  // of one tile: 32 divides its rows and its columns
  for (int y = threadIdx.y; y < kPiece; y += kPieceRows) {
    const int64_t r = row + y, c = column + threadIdx.x;
    if (r >= D || c > r) continue;
    const float* share = cells + y * kTileColumns + threadIdx.x;
    double total = 0;
    for (int split = 0; split < splits; ++split) total += share[split * share_cells(D)];
    Real* to = acc + r * stride_row + c * stride_column;
    *to = piece[y][threadIdx.x] = static_cast<Real>(static_cast<double>(*to) + total);
  }
  __syncthreads();
  for (int y = threadIdx.y; y < kPiece; y += kPieceRows) {
    const int64_t r = row + threadIdx.x, c = column + y;
    if (r < D && c < r) acc[c * stride_row + r * stride_column] = piece[threadIdx.x][y];
  }
}

int make_map(const void* planes, int64_t pitch, int64_t N, int64_t D, int count, int dtype, CUtensorMap* map) {
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found;
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found);
  if (error != cudaSuccess) return error;
  if (found != cudaDriverEntryPointSuccess) return cudaErrorNotSupported;
  const cuuint64_t sizes[3] = {static_cast<cuuint64_t>(D), static_cast<cuuint64_t>(N), static_cast<cuuint64_t>(count)};
  const cuuint64_t strides[2] = {static_cast<cuuint64_t>(pitch) * 2, static_cast<cuuint64_t>(N * pitch) * 2};
  const cuuint32_t box[3] = {kBlock, kBoxTokens, 1}, every[3] = {1, 1, 1};
  const CUresult result = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(entry)(
      map, dtype == SGF_BFLOAT16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 3,
      const_cast<void*>(planes), sizes, strides, box, every, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? SGF_OK : SGF_CUDA_BAD_ARGUMENT;
}

template <class Element>
int prepare_planes(const void* x, int64_t stride, int64_t N, int64_t D, const float* row_scale, const uint8_t* mask,
                   void* planes, int64_t pitch, cudaStream_t stream) {
  prepare<<<static_cast<unsigned>(N), 256, 0, stream>>>(static_cast<const Element*>(x), stride, N, D, row_scale, mask,
                                                        static_cast<Element*>(planes), pitch);
  return cudaGetLastError();
}

}  // namespace

sgf_cuda_plan sgf_cuda_covariance_plan(int64_t N, int64_t D, int sms) {
  const int splits = choose_splits(N, D, sms);
  return {splits, splits * share_cells(D), 0};
}

int sgf_cuda_covariance(const void* x, int64_t stride, int64_t N, int64_t D, const float* row_scale,
                        const uint8_t* mask, void* planes, void* acc, int64_t stride_row, int64_t stride_column,
                        int acc_dtype, int dtype, sgf_cuda_plan plan, float* workspace, void* stream) {
  if (x == nullptr || acc == nullptr || N < 1 || N > INT32_MAX / 2 || D < 1 || D > INT32_MAX / 2 || plan.splits < 1 ||
      (dtype != SGF_FLOAT16 && dtype != SGF_BFLOAT16) || (acc_dtype != SGF_FLOAT32 && acc_dtype != SGF_FLOAT64) ||
      (planes == nullptr && (row_scale != nullptr || mask != nullptr))) {
    return SGF_CUDA_BAD_ARGUMENT;
  }
  if (workspace == nullptr || plan.workspace < plan.splits * share_cells(D)) return SGF_CUDA_WORKSPACE;
  if (planes == nullptr && (stride % 8 != 0 || stride < D)) return SGF_CUDA_MISALIGNED;
  if (const int status = sgf::check_pointers({planes == nullptr ? x : planes, workspace}, 16)) return status;
  if (const int status = sgf::check_pointers({x, row_scale, mask, acc}, 1)) return status;

  const auto on = static_cast<cudaStream_t>(stream);
  const int64_t pitch = planes == nullptr ? stride : ceil_div(D, 8) * 8;
  if (planes != nullptr) {
    const int status = dtype == SGF_BFLOAT16
                           ? prepare_planes<__nv_bfloat16>(x, stride, N, D, row_scale, mask, planes, pitch, on)
                           : prepare_planes<__half>(x, stride, N, D, row_scale, mask, planes, pitch, on);
    if (status != SGF_OK) return status;
  }
  const bool scaled = row_scale != nullptr;
  CUtensorMap map;
  if (const int status = make_map(planes == nullptr ? x : planes, pitch, N, D, scaled ? 3 : 1, dtype, &map)) {
    return status;
  }
  const auto tiles = dtype == SGF_BFLOAT16 ? partial_tiles<true> : partial_tiles<false>;
  if (const cudaError_t error =
          cudaFuncSetAttribute(tiles, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes)) {
    return error;
  }
  const dim3 grid(static_cast<unsigned>(tiles_of(D) * kRanks), static_cast<unsigned>(plan.splits));
  tiles<<<grid, kThreads, kSharedBytes, on>>>(map, N, D, split_tokens(N, plan.splits), scaled ? 2 : 1, scaled ? 1 : 0,
                                              workspace);
  if (const cudaError_t error = cudaGetLastError()) return error;

  const auto pieces = static_cast<unsigned>(ceil_div(D, kPiece));
  const dim3 grid2(pieces, pieces), threads(kPiece, kPieceRows);
  if (acc_dtype == SGF_FLOAT64) {
    reduce_mirror<<<grid2, threads, 0, on>>>(workspace, plan.splits, static_cast<double*>(acc), D, stride_row,
                                             stride_column);
  } else {
    reduce_mirror<<<grid2, threads, 0, on>>>(workspace, plan.splits, static_cast<float*>(acc), D, stride_row,
                                             stride_column);
  }
  return cudaGetLastError();
}
