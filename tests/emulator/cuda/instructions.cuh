// What the instructions of csrc/cuda/instructions.cuh do, for the emulator.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <vector>

namespace sgf {

inline void let_next_start() {}

inline void wait_for_previous() { emulator::previous_ended(); }

template <bool kStreamed>
void load_16_bytes(uint32_t (&x)[4], const void* from, bool wanted) {
  if (!wanted) return;
  if (reinterpret_cast<uintptr_t>(from) % 16 != 0) emulator::fail("a load of 16 bytes from an unaligned address");
  std::memcpy(x, from, sizeof(x));
}

inline void store_16_bytes(void* to, const uint32_t (&x)[4]) {
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0) emulator::fail("a store of 16 bytes to an unaligned address");
  std::memcpy(to, x, sizeof(x));
}

inline float fast_exp2(float x) { return std::exp2(x); }

inline float fast_reciprocal(float x) { return 1 / x; }

inline void prefetch_to_l2(const void*) {}

inline int32_t count_in(int32_t* counter) { return (*counter)++; }

template <bool kBfloat16>
float widen_half(uint32_t pair, int which) {
  const auto bits = static_cast<uint16_t>(pair >> (16 * which));
  return kBfloat16 ? emulator::bfloat16_to_float(bits) : emulator::half_to_float(bits);
}

// sum + a b over 16 k, as tensor cores are known to do it (arXiv 2512.07004): the terms of a block are cut off at a
// fixed distance behind the largest of their exponents, added exactly, and the sum is cut to fp32. A test's error on
// them thus is the GPU's. What is not finite is left to the host's arithmetic.
constexpr int kBlock = __CUDA_ARCH__ >= 900 ? 16 : 8, kBitsKept = __CUDA_ARCH__ >= 900 ? 25 : 24;

inline int exponent(float x) { return static_cast<int>(std::bit_cast<uint32_t>(x) >> 23 & 0xff) - 127; }

inline float dot(float sum, const float (&a)[16], const float (&b)[16]) {
  for (int block = 0; block < 16; block += kBlock) {
    int largest = exponent(sum), wildest = largest;
    for (int k = block; k < block + kBlock; ++k) {
      largest = std::max(largest, exponent(a[k]) + exponent(b[k]));
      wildest = std::max({wildest, exponent(a[k]), exponent(b[k])});
    }
    if (wildest > 127) {
      for (int k = block; k < block + kBlock; ++k) sum += a[k] * b[k];
      continue;
    }
    const double grid = std::ldexp(1.0, largest - kBitsKept), scale = 1 / grid;
    auto total = static_cast<int64_t>(sum * scale);
    for (int k = block; k < block + kBlock; ++k) {
      total += static_cast<int64_t>(static_cast<double>(a[k]) * b[k] * scale);
    }
    const double exact = static_cast<double>(total) * grid;
    sum = static_cast<float>(exact);
    if (std::abs(sum) > std::abs(exact)) sum = std::nextafter(sum, 0.0f);
  }
  return sum;
}

template <bool kBfloat16>
void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct Shown {
    const uint32_t* a;
    const uint32_t* b;
  } mine{a, b};
  void* const* shown = emulator::exchange(emulator::kWarp, &mine);
  const int lane = threadIdx.x % emulator::kWarp, group = lane / 4, member = lane % 4;
  float sums[4];
  for (int c = 0; c < 4; ++c) {
    const int half = c / 2, column = 2 * member + c % 2;
    float a16[16], b16[16];
    for (int k = 0; k < 16; ++k) {
      const int owner = k % 8 / 2, upper = k / 8;
      const auto& left = *static_cast<const Shown*>(shown[4 * group + owner]);
      const auto& right = *static_cast<const Shown*>(shown[4 * column + owner]);
      a16[k] = widen_half<kBfloat16>(left.a[half + 2 * upper], k % 2);
      b16[k] = widen_half<kBfloat16>(right.b[upper], k % 2);
    }
    sums[c] = dot(d[c], a16, b16);
  }
  emulator::exchange(emulator::kWarp, nullptr);
  std::memcpy(d, sums, sizeof(sums));
}

inline uint32_t shared_address(const void* pointer) { return emulator::shared_address(pointer); }

inline uint8_t* dynamic_shared() { return emulator::dynamic_shared(); }

template <bool kOrdered>
void cluster_arrive() {
  emulator::cluster_arrive();
}

inline void cluster_wait() { emulator::cluster_wait(); }

inline void cluster_sync() {
  emulator::cluster_arrive();
  emulator::cluster_wait();
}

inline float4 load_from(int rank, const float4* quad, bool wanted) {
  float4 x{};
  if (wanted) std::memcpy(&x, emulator::shared_pointer(shared_address(quad), rank), sizeof(x));
  return x;
}

inline void init(uint32_t barrier, int arrivals) {
  emulator::barrier_init(emulator::shared_pointer(barrier), arrivals);
}

inline void show_barriers() {}

inline void wait(uint32_t barrier, uint32_t parity) {
  emulator::barrier_wait(emulator::shared_pointer(barrier), static_cast<int>(parity));
}

inline void arrive(uint32_t barrier, int rank) { emulator::barrier_arrive(emulator::shared_pointer(barrier, rank), 0); }

inline void arrive_and_expect(uint32_t barrier, int bytes) {
  emulator::barrier_arrive(emulator::shared_pointer(barrier), bytes);
}

// The 128-byte swizzle: bits 4 to 6 of an address are xored with bits 7 to 9.
inline uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

inline void copy_box(const CUtensorMap* map, int x, int y, int z, uint32_t to, uint32_t barrier, bool both) {
  struct Target {
    uint8_t *origin, *barrier;
  };
  std::vector<Target> targets;
  for (int rank = 0; rank < 2; ++rank) {
    if (!both && rank != emulator::cluster_rank()) continue;
    // The address of the swizzle is the one in shared memory, so it is taken apart per element below.
    targets.push_back({emulator::shared_pointer(0, rank), emulator::shared_pointer(barrier, rank)});
  }
  if (to % 128 != 0) emulator::fail("a box that does not start at a multiple of 128 bytes");
  emulator::later([=, map = *map] {
    for (const Target& target : targets) {
      uint32_t at = to;
      for (uint32_t row = 0; row < map.box[1]; ++row) {
        for (uint32_t column = 0; column < map.box[0]; ++column, at += 2) {
          const int64_t place[3] = {x + static_cast<int64_t>(column), y + static_cast<int64_t>(row), z};
          bool inside = true;
          for (int i = 0; i < 3; ++i) inside = inside && place[i] >= 0 && place[i] < static_cast<int64_t>(map.sizes[i]);
          uint16_t value = 0;
          if (inside)
            std::memcpy(&value, map.base + place[0] * 2 + place[1] * map.strides[0] + place[2] * map.strides[1], 2);
          std::memcpy(target.origin + swizzled(at), &value, 2);
        }
      }
      emulator::barrier_complete(target.barrier, at - to);
    }
  });
}

// One operand's element mn, k of 16, by its descriptor (128-byte swizzle): along K, or along M and N.
template <bool kBfloat16, bool kAlongMN>
float operand(const uint8_t* origin, uint64_t descriptor, int mn, int k) {
  const auto field = [&](int bit) { return static_cast<uint32_t>(descriptor >> bit & 0x3fff) << 4; };
  const uint32_t start = field(0), leading = field(16), stride = field(32);
  const uint32_t address = kAlongMN ? start + mn / 64 * leading + k / 8 * stride + k % 8 * 128 + mn % 64 * 2
                                    : start + mn / 8 * stride + mn % 8 * 128 + k * 2;
  uint16_t bits;
  std::memcpy(&bits, origin + swizzled(address), 2);
  return kBfloat16 ? emulator::bfloat16_to_float(bits) : emulator::half_to_float(bits);
}

template <bool kBfloat16, bool kAlongM, bool kAlongN, int kAccumulators>
void wgmma(float (&d)[kAccumulators], uint64_t left, uint64_t right, int add) {
  if (left >> 62 != 1 || right >> 62 != 1) emulator::fail("a descriptor of another swizzle");
  void* const* shown = emulator::exchange(emulator::kWarpgroup, d);
  std::array<float*, emulator::kWarpgroup> lanes;
  std::copy_n(reinterpret_cast<float* const*>(shown), emulator::kWarpgroup, lanes.begin());
  emulator::exchange(emulator::kWarpgroup, nullptr);
  if (threadIdx.x % emulator::kWarpgroup != 0) return;
  emulator::tensor_cores([=, origin = emulator::shared_pointer(0)] {
    constexpr int kColumns = 2 * kAccumulators;
    static thread_local float a[64][16], b[kColumns][16];
    for (int k = 0; k < 16; ++k) {
      for (int m = 0; m < 64; ++m) a[m][k] = operand<kBfloat16, kAlongM>(origin, left, m, k);
      for (int n = 0; n < kColumns; ++n) b[n][k] = operand<kBfloat16, kAlongN>(origin, right, n, k);
    }
    for (int lane = 0; lane < emulator::kWarpgroup; ++lane) {
      for (int c = 0; c < kAccumulators; ++c) {
        const int m = lane / 32 * 16 + lane % 32 / 4 + c / 2 % 2 * 8, n = c / 4 * 8 + lane % 4 * 2 + c % 2;
        lanes[lane][c] = dot(add != 0 ? lanes[lane][c] : 0, a[m], b[n]);
      }
    }
  });
}

inline void fence() {}

inline void pass_on() { emulator::meet_without_waiting(1, 256); }

inline void wait_for_turn() { emulator::meet(1, 256); }

inline void commit() { emulator::tensor_cores_commit(); }

template <int kPending>
void wait_for_tensor_cores() {
  emulator::tensor_cores_wait(kPending);
}

template <int kAccumulators>
void pin(float (&)[kAccumulators]) {}

template <int kRegisters>
void give_registers_back() {}

template <int kRegisters>
void take_registers() {}

}  // namespace sgf
