// What the decode kernels share on the device: streaming a weight through the tensor cores, and adding up the shares.
//
//      k ->      chunk 0   1   2  ...  7   8   9 ...          64 rows of W x 32 k = 4 KB per chunk
//     +--------+-----------------------------------+
//   64|  tile  | w 0  w 1  w 2    w 7 w 0  w 1     |   warp w of 8 streams every eighth chunk from global memory into
//     +--------+-----------------------------------+   registers, in fragment order (decode.h): no shared memory
//   64|  tile  |   <-- split 0 --> <-- split 1 --> |
//     +--------+-----------------------------------+
//
// A warp has the 8 loads of 16 bytes per lane of two chunks in flight at once (of one for more than 8 rows), and an SM
// holds two blocks: 128 KB in flight (64 KB). An H200 needs 29 KB per SM to be kept busy: 4.8 TB/s for 0.8 us over 132
// SMs. So one block per SM saturates memory (two), and a wave that leaves other slots empty loses nothing. The
// activations, 32 k of up to 16 rows per chunk, come through L1. Each operand is loaded in its own way: the columns of
// a wider matrix that a low-rank shortcut hands in may be read element by element, while the weight keeps its vectors.
//
// At the end the eight warps' sums meet in shared memory and are added in order. The splits of a tile are a cluster:
//
//     rank 0   own sum |barrier| reads the ranks' sums in order, finishes the tile        barrier
//     rank r   own sum |barrier| waits, for its shared memory must outlast the reading  |barrier|
//
// so that between blocks 260 bytes per row and split move, from SM to SM. Before compute capability 9.0 they move
// through a workspace in L2, and the last block of a tile to arrive adds them, in the same order: same bits. Predicted
// for 4 splits, M=1: 0.7 us at the end of a tile in place of 1.7 for a fence, an atomic and two ways through L2, which
// is 5 to 10 % of the kernels that split; not yet measured.
//
// What the splits leave at the end, and the next kernel's start, overlap: its blocks take free slots at once and fetch
// their first 64 KB each into L2.
//
// Rows of 64-byte pieces want strides of whole 32-byte sectors: at d = 2872 every second row's pieces touch three
// sectors, 1.25 times the traffic between L2 and the SMs (not that of the memory).
#pragma once

#include "cuda/decode.h"
#include "cuda/element.cuh"
#include "cuda/launch.cuh"

namespace sgf::decode {

using sgf::Bfloat16, sgf::Half;

constexpr int kPrefetched = 2;  // chunks per warp that are fetched into L2 before the previous kernel has ended

// The first `count` of 8 elements from an aligned address, zeros for the rest: one load, and count is 0 or 8.
template <bool kStreamed>
__device__ __forceinline__ Vector load_vector(const uint16_t* from, int count) {
  Vector loaded{};
  load_16_bytes<kStreamed>(loaded.pair, from, count > 0);
  return loaded;
}

// The same from any address, element by element.
__device__ __forceinline__ Vector load_elements(const uint16_t* from, int count) {
  Vector loaded{};
#pragma unroll
  for (int e = 0; e < kVector; ++e) {
    if (e < count) loaded.pair[e / 2] |= static_cast<uint32_t>(from[e]) << (16 * (e % 2));
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
      if (weight.count(chunk, v) > 0) prefetch_to_l2(weight.at(chunk, v));
    }
  }
}

// What one lane accumulates: C fragments of its tile, kColumns / 8 of them side by side, and squares of activations.
template <int kColumns>
struct Sums {
  float tile[kBlocks16][kColumns / 8][4];
  float square[kColumns / 8];
};

// Adds this warp's chunks of the product weight * x^T, and of the sums of squares of x where they are wanted. All loads
// of the weight are on their way before the first of x, which may have to be waited for element by element.
template <class Element, int kColumns, bool kVectors, class Weight>
__device__ __forceinline__ void stream_as(const Weight& weight, const Activations& x, Chunks chunks, bool squares,
                                          Sums<kColumns>& sums) {
  constexpr int kBlocks8 = kColumns / 8;
  constexpr int kBatch = kMaxRows / kColumns;  // chunks in flight at once: what the registers hold
  for (int chunk = chunks.first + static_cast<int>(threadIdx.x / 32); chunk < chunks.last; chunk += kBatch * kWarps) {
    Vector loaded[kBatch][kLoads], loaded_x[kBatch][kBlocks8];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int next = chunk + j * kWarps;
#pragma unroll
      for (int v = 0; v < kLoads; ++v) {
        const int count = next < chunks.last ? weight.count(next, v) : 0;
        loaded[j][v] =
            kVectors ? load_vector<true>(weight.at(next, v), count) : load_elements(weight.at(next, v), count);
      }
    }
    const auto load_x = [&](auto load) {
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        const int next = chunk + j * kWarps;
#pragma unroll
        for (int block = 0; block < kBlocks8; ++block) {
          loaded_x[j][block] = load(x.at(next, block), next < chunks.last ? x.count(next, block) : 0);
        }
      }
    };
    if (x.vectors) {
      load_x(load_vector<false>);
    } else {
      load_x(load_elements);
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
          for (int block = 0; block < kBlocks8; ++block) mma<Element::kBfloat16>(sums.tile[i][block], a, b[block]);
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

template <class Element, int kColumns, class Weight>
__device__ __forceinline__ void stream(const Weight& weight, bool vectors, const Activations& x, Chunks chunks,
                                       bool squares, Sums<kColumns>& sums) {
  if (vectors) {
    stream_as<Element, kColumns, true>(weight, x, chunks, squares, sums);
  } else {
    stream_as<Element, kColumns, false>(weight, x, chunks, squares, sums);
  }
}

__device__ __forceinline__ void add(float4& to, const float4& x) { to.x += x.x, to.y += x.y, to.z += x.z, to.w += x.w; }

template <int kColumns>
struct Shared {
  alignas(sizeof(float4)) float share[kWarps][share_cells(kColumns)];
};

// Adds up a tile over warps and splits, in order. True in the block that finishes the tile: shared.share[0] then holds
// the sums of the first M rows. From compute capability 9.0 on that is the cluster's first block, which reads the
// others' shared memory; before, the last one to have left its share in the workspace.
template <int kColumns, class Slot>
__device__ __forceinline__ bool add_up(const Sums<kColumns>& sums, Slot slot, int M, Shared<kColumns>& shared,
                                       float* workspace, int32_t* counters) {
  constexpr int kOwn = own_quads(kColumns);
  const int split = blockIdx.y, splits = gridDim.y, cells = share_cells(M);
  const Lane lane = lane_of(threadIdx.x % 32);
  float* warp = shared.share[threadIdx.x / 32];
#pragma unroll
  for (int block = 0; block < kColumns / 8; ++block) {
#pragma unroll
    for (int i = 0; i < kBlocks16; ++i) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int m = 8 * block + accumulator_column(lane.member, c);
        if (m < M) warp[cell_of(m, slot(lane.group, i, accumulator_half(c)))] = sums.tile[i][block][c];
      }
    }
    float square = sums.square[block];
    square += __shfl_xor_sync(0xffffffff, square, 1);
    square += __shfl_xor_sync(0xffffffff, square, 2);
    if (lane.member == 0) warp[cell_of(8 * block + lane.group, kSquare)] = square;
  }
  __syncthreads();

  float4 own[kOwn];
#pragma unroll
  for (int j = 0; j < kOwn; ++j) {
    own[j] = {};
    if (own_quad(threadIdx.x, j) >= cells) continue;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      add(own[j], *reinterpret_cast<const float4*>(&shared.share[w][own_quad(threadIdx.x, j)]));
    }
  }
  // The first warp's share becomes the block's, and then the tile's: no other thread reads this one's quads of it.
  const auto quad = [&](int j) { return reinterpret_cast<float4*>(&shared.share[0][own_quad(threadIdx.x, j)]); };
  const auto keep = [&] {
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
      if (own_quad(threadIdx.x, j) < cells) *quad(j) = own[j];
    }
  };

#if __CUDA_ARCH__ >= 900
  if (splits > 1) {
    keep();
    cluster_arrive<true>();
    cluster_wait();
    if (split > 0) {
      cluster_arrive<false>();
      cluster_wait();  // until the first block has read: a block's shared memory ends with it
      return false;
    }
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
      const bool mine = own_quad(threadIdx.x, j) < cells;
      own[j] = {};
#pragma unroll
      for (int rank = 0; rank < kMaxSplits; ++rank) add(own[j], load_from(rank, quad(j), mine && rank < splits));
    }
  }
  keep();
  __syncthreads();
  if (splits > 1) cluster_arrive<false>();  // everything that was read has arrived and has been added
#else
  if (splits > 1) {
    constexpr int kShare = share_cells(kColumns);
    float* shares = workspace + static_cast<int64_t>(blockIdx.x) * splits * kShare;
    const auto quad_in = [&](int s, int j) {
      return reinterpret_cast<float4*>(shares + s * kShare + own_quad(threadIdx.x, j));
    };
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
      if (own_quad(threadIdx.x, j) < cells) *quad_in(split, j) = own[j];
    }
    if (!arrives_last(counters + blockIdx.x, splits)) return false;
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
      own[j] = {};
      if (own_quad(threadIdx.x, j) >= cells) continue;
      for (int s = 0; s < splits; ++s) add(own[j], __ldcg(quad_in(s, j)));
    }
  }
  keep();
  __syncthreads();
#endif
  return true;
}

// The host's side: what both launchers check.

inline int check_decode(const sgf_matrix& x, int64_t tiles, int dtype, int splits) {
  const bool fits = x.rows >= 1 && x.rows <= kMaxRows && x.columns >= 1 && x.columns <= kMaxWidth && tiles >= 1 &&
                    tiles <= INT32_MAX && is_cluster(splits);
  return fits && (dtype == SGF_FLOAT16 || dtype == SGF_BFLOAT16) ? SGF_OK : SGF_CUDA_BAD_ARGUMENT;
}

inline int check_cells(const sgf_matrix& workspace, int64_t cells, const sgf_matrix& counters, int64_t counts) {
  if (workspace.columns < cells || counters.columns < counts) return SGF_CUDA_WORKSPACE;
  if (const int status = check_operands({workspace}, sizeof(float4))) return status;
  return check_operands({counters}, sizeof(int32_t));
}

// A matrix with contiguous rows.
inline Matrix rows_of(const sgf_matrix& matrix) {
  const bool aligned = reinterpret_cast<uintptr_t>(matrix.data) % sizeof(Vector) == 0;
  return {static_cast<const uint16_t*>(matrix.data), matrix.row_stride,
          aligned && matrix.columns % kVector == 0 && (matrix.rows == 1 || matrix.row_stride % kVector == 0)};
}

// A block per tile and split; the splits of a tile are a cluster.
template <class Arguments>
int launch_decode(void (*kernel)(Arguments), int64_t tiles, int splits, uintptr_t stream, const Arguments& arguments) {
  const dim3 cluster(1, static_cast<unsigned>(splits)), grid(static_cast<unsigned>(tiles), cluster.y);
  return launch(kernel, {grid, kThreads, 0, cluster}, stream, arguments);
}

}  // namespace sgf::decode
