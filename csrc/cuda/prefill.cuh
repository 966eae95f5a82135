// What the prefill kernels share on the device: a persistent, warp-specialised matmul, y = left right^T, over the k of
// one or two operand pairs, and how a finished tile's columns come and go.
//
//     copy engine -> ring of 4 to 7 stages -> tensor cores -> registers -> global memory
//      1 thread         (prefill.h)           2 warpgroups, 64 x W each, of a tile that two blocks share along N
//
// Why 128 x 256 per block: a step of 64 k is 1024 clocks of tensor cores (4096 FLOPs per clock), and brings 16 KB of
// the left and, as the cluster's other block brings the other half of the right, 16 KB of that: 32 bytes per clock and
// SM from L2. At 128 x 128 it would be 48, in one block as in a warpgroup by itself with the other one a tile behind
// ("ping-pong"), which L2 does not give. Reading both operands takes the tensor cores 80 of the 128 bytes per clock
// that shared memory has: (2 + 8) KB in the 128 clocks of 64 x 256 x 16. Of the four stages, 48 KB each, two are being
// read and two on their way: 2048 clocks against about 1000 for a trip to L2.
//
// Registers: 128 accumulators, 32 for the bias and 16 to 32 for the residual, of 232 per thread; the producer gives
// back what it does not need.
//
// The end of a tile, when a warpgroup scales, adds, activates and stores, is about 1500 clocks (1000 instructions per
// thread, one warp per scheduler) of a tile's 49152 at K = 3072. Part of it hides under the other warpgroup's
// multiplications, because the two are not in step: the second one begins each tile kLead steps after the first. While
// one stores, the other has the tensor cores for itself and takes 512 clocks per step instead of 1024, and so catches
// up by just the lead. At W = 256 that is one step: 512 of the 1500 clocks, and 2 % of the tile remain.
//
// The other widths are there for what 256 would leave idle in the last wave or beyond the last column. Of 64 rows or
// less one warpgroup of the cluster multiplies, of up to 128 two: a step's 2 W or 4 W clocks are then less than the
// weight takes to come from memory.
#pragma once

#include <type_traits>

#include "cuda/element.cuh"
#include "cuda/hopper.cuh"
#include "cuda/prefill.h"

namespace sgf::prefill {

using namespace sgf::hopper;
using sgf::Bfloat16, sgf::Half;

constexpr int kThreads = 3 * 128;

// One or two pairs: left [M, K] and right [rows, K], or right[1] [K, rows] where it lies along N.
struct Problem {
  CUtensorMap left[2], right[2];
  int M, scaled, unscaled;  // scaled and unscaled rows of the weight
  bool gated, along_n;
  int steps_first, steps;  // of the first pair, and of both
  int splits, split_steps;
  int rows, across,
      items;  // in tiles, and how many splits of tiles there are: in registers they would crowd out others
};

// Eight neighbouring columns, as pairs.
struct Words {
  uint32_t pair[4];
};

// The first `count` of eight elements, zeros for the rest.
__device__ __forceinline__ Words load_run(const uint16_t* from, int count) {
  if (__builtin_expect(count == kRun && reinterpret_cast<uintptr_t>(from) % sizeof(Words) == 0, true)) {
    const uint4 x = *reinterpret_cast<const uint4*>(from);
    return {{x.x, x.y, x.z, x.w}};
  }
  uint64_t half[2] = {0, 0};
#pragma unroll 1
  for (int e = 0; e < count; ++e) {
    const uint64_t moved = static_cast<uint64_t>(from[e]) << (16 * (e % 4));
    half[0] |= e < 4 ? moved : 0;
    half[1] |= e < 4 ? 0 : moved;
  }
  return {{static_cast<uint32_t>(half[0]), static_cast<uint32_t>(half[0] >> 32), static_cast<uint32_t>(half[1]),
           static_cast<uint32_t>(half[1] >> 32)}};
}

__device__ __forceinline__ void store_run(uint16_t* to, const Words& words, int count) {
  const uint32_t (&x)[4] = words.pair;
  if (__builtin_expect(count == kRun && reinterpret_cast<uintptr_t>(to) % sizeof(Words) == 0, true)) {
    store_16_bytes(to, x);
    return;
  }
  const uint64_t low = x[0] | static_cast<uint64_t>(x[1]) << 32, high = x[2] | static_cast<uint64_t>(x[3]) << 32;
#pragma unroll 1
  for (int e = 0; e < count; ++e) to[e] = static_cast<uint16_t>((e < 4 ? low : high) >> (16 * (e % 4)));
}

// From a run to the pairs of the accumulators, and back.
__device__ __forceinline__ void transpose(Words& words) {
  const int member = threadIdx.x % 4;
#pragma unroll
  for (int bit = 1; bit <= 2; ++bit) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t word = __shfl_xor_sync(0xffffffff, outgoing(words.pair, member, bit, i), bit);
      incoming(words.pair, member, bit, i, word);
    }
  }
}

// The bias of a tile's columns, one run per chunk, which is on its way while the tile is multiplied.
template <int kWidth>
struct Bias {
  Words runs[Shape<kWidth>::kChunks];

  __device__ __forceinline__ Bias(const uint16_t* bias, const Columns& columns) {
#pragma unroll
    for (int chunk = 0; chunk < Shape<kWidth>::kChunks; ++chunk) {
      const Run run = run_of(kWidth, columns, chunk, threadIdx.x % 4);
      runs[chunk] = load_run(bias + run.row, bias == nullptr ? 0 : run.count);
    }
  }
};

// Shared memory: stages, and the barriers of each.
template <int kWidth>
struct Pipeline {
  uint32_t stages, full, empty;

  __device__ uint32_t at(int stage) const { return stages + stage * Shape<kWidth>::kStageBytes; }
  __device__ uint32_t full_at(int stage) const { return full + stage * sizeof(uint64_t); }
  __device__ uint32_t empty_at(int stage) const { return empty + stage * sizeof(uint64_t); }
};

// One thread: brings this rank's boxes of these steps of a tile.
template <int kWidth, bool kTwoPairs>
__device__ __forceinline__ void bring(const Problem& p, const Pipeline<kWidth>& pipeline, Place place, Steps steps,
                                      const Columns& columns, int rank, Ring<Shape<kWidth>::kStages>& ring) {
  using S = Shape<kWidth>;
#pragma unroll 1
  for (int step = steps.first; step < steps.last; ++step, ring.next()) {
    const bool second = kTwoPairs && step >= p.steps_first, along_n = second && p.along_n;
    const int k = (second ? step - p.steps_first : step) * kStep;
    const uint32_t stage = pipeline.at(ring.stage), barrier = pipeline.full_at(ring.stage);
    const auto copy = [&](const CUtensorMap* map, const Box& box) {
      copy_box(map, box.x, box.y, 0, stage + box.to, barrier, box.both);
    };
    wait(pipeline.empty_at(ring.stage), ring.parity ^ 1);
    arrive_and_expect(barrier, along_n ? S::kStageBytes : S::kBroughtAlongK);
    copy(p.left + second, left_box(k, place.row, rank));
    if (along_n) {
#pragma unroll
      for (int block = 0; block < S::kBlocks; ++block) {
        copy(p.right + 1, right_box_along_n(block, k, columns, rank));
      }
    } else {
      copy(p.right + second, right_box_along_k(kWidth, k, columns, rank));
    }
  }
}

// A warp has read that stage, of which both blocks brought a part.
template <int kWidth>
__device__ __forceinline__ void release(const Pipeline<kWidth>& pipeline, int stage) {
  const int lane = threadIdx.x % 32;
  if (lane < kRanks) arrive(pipeline.empty_at(stage), lane);
  __syncwarp();
}

// A warpgroup: adds the products of these steps, the next ones of the ring, to its sums. It passes its turn on after
// step `pass_after`.
template <int kWidth, bool kBfloat16, bool kAlongN>
__device__ __forceinline__ void multiply(float (&sums)[kWidth / 2], int steps, const Pipeline<kWidth>& pipeline,
                                         int group, int pass_after, Ring<Shape<kWidth>::kStages>& ring) {
  int previous = 0;
  for (int step = 0; step < steps; ++step, ring.next()) {
    const uint32_t stage = pipeline.at(ring.stage);
    wait(pipeline.full_at(ring.stage), ring.parity);
    fence();
#pragma unroll
    for (int k = 0; k < kStep / 16; ++k) {
      wgmma<kBfloat16, false, kAlongN>(sums, left_operand(stage, group, k), right_operand(stage, k, kAlongN), 1);
    }
    commit();
    wait_for_tensor_cores<1>();  // for the step before this one
    if (step > 0) release(pipeline, previous);
    previous = ring.stage;
    if (step == pass_after) pass_on();
  }
  wait_for_tensor_cores<0>();
  if (steps > 0) release(pipeline, previous);
}

// A warpgroup without rows lets these steps pass by.
template <int kWidth>
__device__ __forceinline__ void pass_by(int steps, const Pipeline<kWidth>& pipeline,
                                        Ring<Shape<kWidth>::kStages>& ring) {
#pragma unroll 1
  for (int step = 0; step < steps; ++step, ring.next()) {
    wait(pipeline.full_at(ring.stage), ring.parity);
    release(pipeline, ring.stage);
  }
}

// The whole kernel. Epilogue(p, arguments, place, columns, row) is made before a tile is multiplied and may load what
// it needs; finish(sums) stores the tile: this thread's accumulators of rows `row` and row + 8.
template <int kWidth, class Element, bool kTwoPairs, class Epilogue>
__device__ __forceinline__ void run(const Problem& p, const typename Epilogue::Arguments& arguments) {
  using S = Shape<kWidth>;
  __shared__ uint64_t full[S::kStages], empty[S::kStages];
  const Pipeline<kWidth> pipeline{(shared_address(dynamic_shared()) + 1023) / 1024 * 1024, shared_address(full),
                                  shared_address(empty)};
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < S::kStages; ++stage) {
      init(pipeline.full_at(stage), 1);
      init(pipeline.empty_at(stage), kReaders);
    }
    show_barriers();
  }
  __syncthreads();
  cluster_sync();
  sgf::let_next_start();
  sgf::wait_for_previous();

  const int rank = blockIdx.x % kRanks;  // the cluster is one-dimensional and starts at a multiple of kRanks
  const int first = blockIdx.x / kRanks, clusters = gridDim.x / kRanks;
  Ring<S::kStages> ring;
  // From one lane: so that the compiler knows that a warp stays together, and shuffles need no other way.
  const int group = __shfl_sync(0xffffffff, static_cast<int>(threadIdx.x) / 128, 0);
  if (group == 2) {
    give_registers_back<40>();
    if (threadIdx.x % 128 == 0) {
      for (int item = first; item < p.items; item += clusters) {
        const Place place = place_of(item, p.rows, p.across, p.splits);
        const Columns columns = columns_of(kWidth, place.column, p.scaled, p.unscaled, p.gated);
        bring<kWidth, kTwoPairs>(p, pipeline, place, steps_of(place.split, p.split_steps, p.steps), columns, rank,
                                 ring);
      }
    }
    __syncwarp();
  } else {
    take_registers<232>();
    const int steps_along_k = kTwoPairs && p.along_n ? p.steps_first : p.steps;
    for (int item = first; item < p.items; item += clusters) {
      const Place place = place_of(item, p.rows, p.across, p.splits);
      const Steps steps = steps_of(place.split, p.split_steps, p.steps);
      const int top = place.row * kClusterRows + rank * kTileRows, row = top + group * kGroupRows;
      if (row >= p.M) {
        pass_by(steps.count(), pipeline, ring);
        continue;
      }
      const Columns columns = columns_of(kWidth, place.column, p.scaled, p.unscaled, p.gated);
      Epilogue epilogue(p, arguments, place, columns, row + accumulator_row(threadIdx.x % 128, 0));
      float sums[S::kAccumulators];
#pragma unroll
      for (int c = 0; c < S::kAccumulators; ++c) sums[c] = 0;
      pin(sums);
      const int lead = top + kGroupRows < p.M ? lead_of<kWidth>(steps.count()) : -1;  // none where one is alone
      if (group == 1 && lead >= 0) wait_for_turn();
      const int pass_after = group == 0 ? lead : -1;
      const int along_k = clamp(steps_along_k - steps.first, steps.count());
      multiply<kWidth, Element::kBfloat16, false>(sums, along_k, pipeline, group, pass_after, ring);
      if constexpr (kTwoPairs) {
        multiply<kWidth, Element::kBfloat16, true>(sums, steps.count() - along_k, pipeline, group, pass_after - along_k,
                                                   ring);
      }
      pin(sums);
      epilogue.finish(sums);
      __syncwarp();  // what comes next wants whole warps
    }
  }
  cluster_sync();  // the other block may still be writing into this one's shared memory
}

// The host's side.

inline int check_prefill(int64_t M, int64_t n, int64_t K, int dtype, int sms) {
  const bool fits = M >= 1 && M <= kMaxSize && n >= 1 && n <= kMaxSize && K >= 1 && K <= kMaxSize && sms >= 1;
  return fits && (dtype == SGF_FLOAT16 || dtype == SGF_BFLOAT16) ? SGF_OK : SGF_CUDA_BAD_ARGUMENT;
}

// What the copy engine needs of an operand.
inline int check_copied(const sgf_matrix& matrix) {
  if (matrix.data == nullptr || matrix.row_stride < 1) return SGF_CUDA_BAD_ARGUMENT;
  if (matrix.row_stride % 8 != 0) return SGF_CUDA_MISALIGNED;
  return sgf::check_operands({matrix}, 16);
}

inline int make_map(const sgf_matrix& matrix, int box_rows, int dtype, CUtensorMap* map) {
  return hopper::make_map(matrix.data, {matrix.columns, matrix.rows, 1},
                          {matrix.row_stride, matrix.rows * matrix.row_stride}, box_rows, dtype, map);
}

// Maps of pair number `pair`: left [M, K], and right [n, K] or, where only the second one lies along N, [K, n].
inline int make_maps(Problem& p, int pair, const sgf_matrix& left, const sgf_matrix& right, int width, int dtype) {
  const bool along_n = pair == 1 && p.along_n;
  if (const int status = make_map(left, kTileRows, dtype, p.left + pair)) return status;
  return make_map(right, along_n ? kBoxStep : width / 2, dtype, p.right + pair);
}

inline int check_deal(const Problem& p, Deal deal) {
  const bool whole = is_width(deal.width) && deal.splits >= 1 && deal.splits <= p.steps &&
                     ceil_div(p.steps, ceil_div(p.steps, deal.splits)) == deal.splits;
  const bool counted = whole && tiles_in(deal.width, p.M, p.scaled, p.unscaled, p.gated) <= kMaxTiles / deal.splits;
  return counted ? SGF_OK : SGF_CUDA_BAD_ARGUMENT;
}

// use(W) with the width as a constant.
template <class Use>
auto with_width(int width, Use use) {
  switch (width) {
    case 256:
      return use(std::integral_constant<int, 256>{});
    case 240:
      return use(std::integral_constant<int, 240>{});
    case 224:
      return use(std::integral_constant<int, 224>{});
    case 208:
      return use(std::integral_constant<int, 208>{});
    case 192:
      return use(std::integral_constant<int, 192>{});
    case 160:
      return use(std::integral_constant<int, 160>{});
    default:
      return use(std::integral_constant<int, 128>{});
  }
}

// kernel_of(W) is the kernel of that width.
template <class KernelOf, class Arguments>
int launch_prefill(KernelOf kernel_of, Problem& p, Deal deal, int sms, uintptr_t stream, const Arguments& arguments) {
  p.splits = deal.splits, p.split_steps = ceil_div(p.steps, deal.splits);
  p.rows = ceil_div(p.M, kClusterRows), p.across = tiles_across(deal.width, p.scaled, p.unscaled, p.gated);
  p.items = p.rows * p.across * p.splits;
  const int clusters = sms > kRanks ? sms / kRanks : 1;
  const dim3 grid(static_cast<unsigned>((p.items < clusters ? p.items : clusters) * kRanks));
  return with_width(deal.width, [&](auto width) {
    const Launch how{grid, kThreads, Shape<width>::kSharedBytes, kRanks};
    return hopper::launch(kernel_of(width), how, stream, p, arguments);
  });
}

}  // namespace sgf::prefill
