// What the decode kernels share on the device: streaming a weight through the tensor cores, and adding up the shares.
//
//      k ->      chunk 0   1   2  ...  7   8   9 ...          64 rows of W x 32 k = 4 KB per chunk
//     +--------+-----------------------------------+
//   64|  tile  | w 0  w 1  w 2    w 7 w 0  w 1     |   warp w of 8 streams every eighth chunk from global memory into
//     +--------+-----------------------------------+   registers, in fragment order (decode.h): no shared memory
//   64|  tile  |   <-- split 0 --> <-- split 1 --> |
//     +--------+-----------------------------------+
//
// A warp has a chunk's 8 loads of 16 bytes per lane in flight at once, and an SM holds three blocks, for more than 8
// rows two: up to 96 or 64 KB in flight per SM. The activations, 32 k of up to 16 rows per chunk, come through L1. At
// the end the eight warps' sums meet in shared memory and are added in order; with several splits they meet in the
// workspace, and the last block of a tile to arrive adds them in order.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/decode.h"
#include "cuda/launch.cuh"

namespace sgf::decode {

constexpr int kThreads = 32 * kWarps;
constexpr int kPrefetched = 2;  // chunks per warp that are fetched into L2 before the previous kernel has ended

struct Half {
  static __device__ float widen(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
  static __device__ uint16_t round(float x) { return __half_as_ushort(__float2half_rn(x)); }
};

struct Bfloat16 {
  static __device__ float widen(uint16_t bits) { return __bfloat162float(__ushort_as_bfloat16(bits)); }
  static __device__ uint16_t round(float x) { return __bfloat16_as_ushort(__float2bfloat16_rn(x)); }
};

__device__ __forceinline__ void mma(Half, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void mma(Bfloat16, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Loads the first `count` of 8 elements, zeros for the rest. Aligned: one 16-byte load, and count is 0 or 8. Streamed
// data is used once and passes by L1. (No .nc: the previous kernel may still be running when this one starts, so not
// even the weight is certain to be constant for all of this kernel's life.)
template <bool kAligned, bool kStreamed>
__device__ __forceinline__ Vector load(const uint16_t* from, int count) {
  Vector loaded{};
  uint32_t (&x)[4] = loaded.pair;
  if constexpr (!kAligned) {
#pragma unroll
    for (int e = 0; e < kVector; ++e) {
      if (e < count) x[e / 2] |= static_cast<uint32_t>(from[e]) << (16 * (e % 2));
    }
  } else if constexpr (kStreamed) {
    asm volatile(
        "{ .reg .pred p; setp.gt.s32 p, %5, 0;\n\t"
        "@p ld.global.L1::no_allocate.L2::256B.v4.u32 {%0,%1,%2,%3}, [%4]; }"
        : "+r"(x[0]), "+r"(x[1]), "+r"(x[2]), "+r"(x[3])
        : "l"(from), "r"(count));
  } else {
    asm volatile(
        "{ .reg .pred p; setp.gt.s32 p, %5, 0;\n\t"
        "@p ld.global.v4.u32 {%0,%1,%2,%3}, [%4]; }"
        : "+r"(x[0]), "+r"(x[1]), "+r"(x[2]), "+r"(x[3])
        : "l"(from), "r"(count));
  }
  return loaded;
}

// Fetches the weight's first chunks of this warp into L2, which is where the stores of every kernel meet: unlike a
// load, this may run before the previous kernel has ended.
template <class Weight>
__device__ __forceinline__ void prefetch(const Weight& weight, Chunks chunks) {
  for (int ahead = 0; ahead < kPrefetched; ++ahead) {
    const int chunk = chunks.first + static_cast<int>(threadIdx.x / 32) + ahead * kWarps;
    if (chunk >= chunks.last) return;
#pragma unroll
    for (int v = 0; v < kLoads; ++v) {
      if (weight.count(chunk, v) > 0) asm volatile("prefetch.global.L2 [%0];" ::"l"(weight.at(chunk, v)));
    }
  }
}

// What one lane accumulates: C fragments of its tile, kColumns / 8 of them side by side, and squares of activations.
template <int kColumns>
struct Sums {
  float tile[kBlocks16][kColumns / 8][4];
  float square[kColumns / 8];
};

// Adds this warp's chunks of the product weight * x^T, and of the sums of squares of x where they are wanted.
template <class Element, int kColumns, bool kAligned, class Weight>
__device__ __forceinline__ void stream(const Weight& weight, const Activations& x, Chunks chunks, bool squares,
                                       Sums<kColumns>& sums) {
  constexpr int kBlocks8 = kColumns / 8;
  constexpr int kBatch = kMaxRows / kColumns;  // chunks in flight at once: what the registers hold
  for (int chunk = chunks.first + static_cast<int>(threadIdx.x / 32); chunk < chunks.last; chunk += kBatch * kWarps) {
    Vector loaded[kBatch][kLoads], loaded_x[kBatch][kBlocks8];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int next = chunk + j * kWarps;
      const bool inside = next < chunks.last;
#pragma unroll
      for (int v = 0; v < kLoads; ++v) {
        loaded[j][v] = load<kAligned, true>(weight.at(next, v), inside ? weight.count(next, v) : 0);
      }
#pragma unroll
      for (int block = 0; block < kBlocks8; ++block) {
        loaded_x[j][block] = load<kAligned, false>(x.at(next, block), inside ? x.count(next, block) : 0);
      }
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        uint32_t b[kBlocks8][2];
#pragma unroll
        for (int block = 0; block < kBlocks8; ++block) Activations::fragment(loaded_x[j][block], step, b[block]);
#pragma unroll
        for (int i = 0; i < kBlocks16; ++i) {
          uint32_t a[4];
          Weight::fragment(loaded[j], step, i, a);
#pragma unroll
          for (int block = 0; block < kBlocks8; ++block) mma(Element(), sums.tile[i][block], a, b[block]);
        }
      }
      if (squares) {
#pragma unroll
        for (int block = 0; block < kBlocks8; ++block) {
#pragma unroll
          for (int e = 0; e < kVector; ++e) {
            const uint32_t pair = loaded_x[j][block].pair[e / 2];
            const float value = Element::widen(static_cast<uint16_t>(pair >> (16 * (e % 2))));
            sums.square[block] += value * value;
          }
        }
      }
    }
  }
}

// Where the warps' sums meet. A row's pitch is odd, so that lanes of different columns write to different banks.
template <int kColumns>
struct Shared {
  float tile[kWarps][kColumns][kTileRows + 1];
  float square[kWarps][kColumns];
};

// Adds up a tile over warps and splits, in order. True in the block that finishes the tile: shared.tile[0][m][slot] and
// shared.square[0][m] then hold the sums.
template <int kColumns, class Slot>
__device__ __forceinline__ bool add_up(const Sums<kColumns>& sums, Slot slot, Shared<kColumns>& shared,
                                       float* workspace, int32_t* counters) {
  const int64_t tile = blockIdx.x, tiles = gridDim.x;
  const int split = blockIdx.y, splits = gridDim.y;
  const int warp = threadIdx.x / 32;
  const Lane lane = lane_of(threadIdx.x % 32);
#pragma unroll
  for (int block = 0; block < kColumns / 8; ++block) {
#pragma unroll
    for (int i = 0; i < kBlocks16; ++i) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int m = 8 * block + accumulator_column(lane.member, c);
        shared.tile[warp][m][slot(lane.group, i, accumulator_half(c))] = sums.tile[i][block][c];
      }
    }
    float square = sums.square[block];
    square += __shfl_xor_sync(0xffffffff, square, 1);
    square += __shfl_xor_sync(0xffffffff, square, 2);
    if (lane.member == 0) shared.square[warp][8 * block + lane.group] = square;
  }
  __syncthreads();

  constexpr int kCells = kColumns * kTileRows / kThreads;  // of the tile, per thread
  const int own_row = threadIdx.x / kTileRows, own_slot = threadIdx.x % kTileRows;
  float cells[kCells], square = 0;
#pragma unroll
  for (int j = 0; j < kCells; ++j) {
    cells[j] = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) cells[j] += shared.tile[w][own_row + j * (kThreads / kTileRows)][own_slot];
  }
  if (threadIdx.x < kColumns) {
#pragma unroll
    for (int w = 0; w < kWarps; ++w) square += shared.square[w][threadIdx.x];
  }

  if (splits > 1) {
    float* tile_shares = workspace + tile * splits * kColumns * kTileRows;
    float* square_shares = workspace + (tiles * kTileRows + tile) * splits * kColumns;
#pragma unroll
    for (int j = 0; j < kCells; ++j) tile_shares[split * kColumns * kTileRows + j * kThreads + threadIdx.x] = cells[j];
    if (threadIdx.x < kColumns) square_shares[split * kColumns + threadIdx.x] = square;
    if (!arrives_last(counters + tile, splits)) return false;
#pragma unroll
    for (int j = 0; j < kCells; ++j) {
      cells[j] = 0;
      for (int s = 0; s < splits; ++s)
        cells[j] += __ldcg(tile_shares + s * kColumns * kTileRows + j * kThreads + threadIdx.x);
    }
    if (threadIdx.x < kColumns) {
      square = 0;
      for (int s = 0; s < splits; ++s) square += __ldcg(square_shares + s * kColumns + threadIdx.x);
    }
  }

  // Slots of warp 0 that no other thread reads: each thread writes back what it alone has added up.
#pragma unroll
  for (int j = 0; j < kCells; ++j) shared.tile[0][own_row + j * (kThreads / kTileRows)][own_slot] = cells[j];
  if (threadIdx.x < kColumns) shared.square[0][threadIdx.x] = square;
  __syncthreads();
  return true;
}

// The host's side: what both launchers check.
inline int check_decode(int M, int64_t tiles, int K, int dtype, sgf_cuda_plan plan, int64_t workspace_cells,
                        int64_t counter_cells, const float* workspace, const int32_t* counters) {
  if (M < 1 || M > kMaxRows || tiles < 1 || tiles > INT32_MAX || K < 1 || K > kMaxWidth || plan.splits < 1 ||
      plan.splits > kMaxSplits || (dtype != SGF_FLOAT16 && dtype != SGF_BFLOAT16)) {
    return SGF_CUDA_BAD_ARGUMENT;
  }
  const bool missing = (workspace_cells > 0 && workspace == nullptr) || (counter_cells > 0 && counters == nullptr);
  const bool short_of = plan.workspace < workspace_cells || plan.counters < counter_cells;
  return missing || short_of ? SGF_CUDA_WORKSPACE : SGF_OK;
}

// True where every row of a matrix consists of whole, aligned 16-byte vectors.
inline bool vectors(const void* matrix, int64_t stride, int64_t width) {
  return reinterpret_cast<uintptr_t>(matrix) % sizeof(Vector) == 0 && stride % kVector == 0 && width % kVector == 0;
}

inline dim3 decode_grid(int64_t tiles, sgf_cuda_plan plan) {
  return dim3(static_cast<unsigned>(tiles), static_cast<unsigned>(plan.splits));
}

}  // namespace sgf::decode
