// The instructions that the kernels call by name, and nothing else: what C++ has no word for. The tests' emulator puts
// another file in the place of this one.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace sgf {

// ---- The next kernel and the one before (programmatic dependent launch, compute capability 9.0) ----

// Lets the next kernel's blocks start as soon as this one's stop needing the SMs.
__device__ __forceinline__ void let_next_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Returns once the kernel before this one has ended and its stores are visible. Until then a kernel may only prefetch.
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// ---- Global memory ----

// Loads 16 bytes where `wanted`, else leaves x alone. Streamed data is used once: it passes by L1 and is the first to
// leave L2, where it would drive out what the next kernel has already fetched. (No .nc: the previous kernel may still
// be running when this one starts, so not even a weight is certain to be constant for all of this kernel's life.)
template <bool kStreamed>
__device__ __forceinline__ void load_16_bytes(uint32_t (&x)[4], const void* from, bool wanted) {
  if constexpr (kStreamed) {
    uint64_t leaves_first;
    asm("createpolicy.fractional.L2::evict_first.b64 %0;" : "=l"(leaves_first));
    asm volatile(
        "{ .reg .pred p; setp.ne.s32 p, %5, 0;\n\t"
        "@p ld.global.L1::no_allocate.L2::cache_hint.L2::256B.v4.u32 {%0,%1,%2,%3}, [%4], %6; }"
        : "+r"(x[0]), "+r"(x[1]), "+r"(x[2]), "+r"(x[3])
        : "l"(from), "r"(static_cast<int>(wanted)), "l"(leaves_first));
  } else {
    asm volatile(
        "{ .reg .pred p; setp.ne.s32 p, %5, 0;\n\t"
        "@p ld.global.v4.u32 {%0,%1,%2,%3}, [%4]; }"
        : "+r"(x[0]), "+r"(x[1]), "+r"(x[2]), "+r"(x[3])
        : "l"(from), "r"(static_cast<int>(wanted)));
  }
}

__device__ __forceinline__ void store_16_bytes(void* to, const uint32_t (&x)[4]) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3])
               : "memory");
}

// Fetches a line into L2, which is where the stores of every kernel meet: unlike a load, this may run before the
// previous kernel has ended.
__device__ __forceinline__ void prefetch_to_l2(const void* from) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(from));
}

// Adds one to an integer; releases what this thread may know of, and acquires what those before it released.
__device__ __forceinline__ int32_t count_in(int32_t* counter) {
  int32_t before;
  asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
  return before;
}

// ---- Arithmetic: a unit or two in the last place, and no subnormal numbers ----

__device__ __forceinline__ float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float fast_reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// ---- Tensor cores of compute capability 8.0 ----

// d += a b: 16 x 8 over 16 k, of one warp.
template <bool kBfloat16>
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#define SGF_MMA(types)                                                                                            \
  asm("mma.sync.aligned.m16n8k16.row.col.f32." types ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                            \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
  if constexpr (kBfloat16) {
    SGF_MMA("bf16.bf16");
  } else {
    SGF_MMA("f16.f16");
  }
#undef SGF_MMA
}

// ---- Clusters, barriers, the copy engine and the tensor cores of compute capability 9.0 ----

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Shared memory beyond what the kernel declares.
__device__ __forceinline__ uint8_t* dynamic_shared() {
  extern __shared__ uint8_t bytes[];
  return bytes;
}

// Shows the barriers' initial state to the cluster and to the copy engine.
__device__ __forceinline__ void show_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// The barrier of all threads of a cluster. `kOrdered`: what a block has stored before it arrives is there for the
// others once they have waited.
template <bool kOrdered>
__device__ __forceinline__ void cluster_arrive() {
  if constexpr (kOrdered) {
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  } else {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
  }
}

__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// The quad that the block of this rank holds in this place of its shared memory; zeros where it is not wanted.
__device__ __forceinline__ float4 load_from(int rank, const float4* quad, bool wanted) {
  float4 x{};
  asm volatile(
      "{ .reg .pred p; .reg .b32 there; setp.ne.s32 p, %6, 0;\n\t"
      "mapa.shared::cluster.u32 there, %4, %5;\n\t"
      "@p ld.shared::cluster.v4.f32 {%0,%1,%2,%3}, [there]; }"
      : "+f"(x.x), "+f"(x.y), "+f"(x.z), "+f"(x.w)
      : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(quad))), "r"(rank), "r"(static_cast<int>(wanted))
      : "memory");
  return x;
}

__device__ __forceinline__ void cluster_sync() {
  cluster_arrive<true>();
  cluster_wait();
}

__device__ __forceinline__ void init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}

// The barriers order reads of shared memory by the tensor cores and writes by the copy engine, which no store of a
// thread takes part in: so the waits and arrivals say nothing of the cluster's scope, where they would cost a fence of
// all memory and the contents of L1 each time.
__device__ __forceinline__ void wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{ .reg .pred done;\n\t"
      "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n\t"
      "@!done bra again; }" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// Arrives at the barrier that stands at this address in the block with this rank.
__device__ __forceinline__ void arrive(uint32_t barrier, int rank) {
  asm volatile(
      "{ .reg .b32 remote;\n\t"
      "mapa.shared::cluster.u32 remote, %0, %1;\n\t"
      "mbarrier.arrive.shared::cluster.b64 _, [remote]; }" ::"r"(barrier),
      "r"(rank)
      : "memory");
}

__device__ __forceinline__ void arrive_and_expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Brings the box at (x, y, z) into this block's shared memory, or into that of both, to the same address; the bytes
// count at the barrier beside them.
__device__ __forceinline__ void copy_box(const CUtensorMap* map, int x, int y, int z, uint32_t to, uint32_t barrier,
                                         bool both) {
  if (both) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%0], [%1, {%2, %3, %4}], [%5], %6;" ::"r"(to),
        "l"(map), "r"(x), "r"(y), "r"(z), "r"(barrier), "h"(static_cast<uint16_t>(3))
        : "memory");
  } else {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];" ::
            "r"(to),
        "l"(map), "r"(x), "r"(y), "r"(z), "r"(barrier)
        : "memory");
  }
}

// d = a b, plus d where `add`: 64 x N over 16 k, N being twice the number of a thread's accumulators. Operands lie
// along K, or along M and N.
#define SGF_LIST64                                                   \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"            \
  ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31" \
  ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47" \
  ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define SGF_LIST80 \
  SGF_LIST64       \
  ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79"
#define SGF_LIST96 \
  SGF_LIST80       \
  ",%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"
#define SGF_LIST104 \
  SGF_LIST96        \
  ",%96,%97,%98,%99,%100,%101,%102,%103"
#define SGF_LIST112 \
  SGF_LIST104       \
  ",%104,%105,%106,%107,%108,%109,%110,%111"
#define SGF_LIST120 \
  SGF_LIST112       \
  ",%112,%113,%114,%115,%116,%117,%118,%119"
#define SGF_LIST128 \
  SGF_LIST120       \
  ",%120,%121,%122,%123,%124,%125,%126,%127"
#define SGF_IN_OUT8(i)                                                                                        \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define SGF_IN_OUT16(i) SGF_IN_OUT8(i), SGF_IN_OUT8(i + 8)
#define SGF_IN_OUT64 SGF_IN_OUT16(0), SGF_IN_OUT16(16), SGF_IN_OUT16(32), SGF_IN_OUT16(48)
#define SGF_IN_OUT80 SGF_IN_OUT64, SGF_IN_OUT16(64)
#define SGF_IN_OUT96 SGF_IN_OUT80, SGF_IN_OUT16(80)
#define SGF_IN_OUT104 SGF_IN_OUT96, SGF_IN_OUT8(96)
#define SGF_IN_OUT112 SGF_IN_OUT104, SGF_IN_OUT8(104)
#define SGF_IN_OUT120 SGF_IN_OUT112, SGF_IN_OUT8(112)
#define SGF_IN_OUT128 SGF_IN_OUT120, SGF_IN_OUT8(120)
#define SGF_MMA(types, N, list, a, b, add, along_m, along_n, ...)                                                      \
  asm volatile("{ .reg .pred add;\n\tsetp.ne.b32 add, " add                                                            \
               ", 0;\n\t"                                                                                              \
               "wgmma.mma_async.sync.aligned.m64n" N "k16.f32." types " {" list "}, " a ", " b ", add, 1, 1, " along_m \
               ", " along_n "; }"                                                                                      \
               : __VA_ARGS__                                                                                           \
               : "l"(left), "l"(right), "r"(add_to), "n"(static_cast<int>(kAlongM)), "n"(static_cast<int>(kAlongN)))
#define SGF_WGMMA(accumulators, N, ...)                                                                        \
  template <bool kBfloat16, bool kAlongM, bool kAlongN>                                                        \
  __device__ __forceinline__ void wgmma(float (&d)[accumulators], uint64_t left, uint64_t right, int add_to) { \
    if constexpr (kBfloat16) {                                                                                 \
      SGF_MMA("bf16.bf16", N, __VA_ARGS__);                                                                    \
    } else {                                                                                                   \
      SGF_MMA("f16.f16", N, __VA_ARGS__);                                                                      \
    }                                                                                                          \
  }
SGF_WGMMA(64, "128", SGF_LIST64, "%64", "%65", "%66", "%67", "%68", SGF_IN_OUT64)
SGF_WGMMA(80, "160", SGF_LIST80, "%80", "%81", "%82", "%83", "%84", SGF_IN_OUT80)
SGF_WGMMA(96, "192", SGF_LIST96, "%96", "%97", "%98", "%99", "%100", SGF_IN_OUT96)
SGF_WGMMA(104, "208", SGF_LIST104, "%104", "%105", "%106", "%107", "%108", SGF_IN_OUT104)
SGF_WGMMA(112, "224", SGF_LIST112, "%112", "%113", "%114", "%115", "%116", SGF_IN_OUT112)
SGF_WGMMA(120, "240", SGF_LIST120, "%120", "%121", "%122", "%123", "%124", SGF_IN_OUT120)
SGF_WGMMA(128, "256", SGF_LIST128, "%128", "%129", "%130", "%131", "%132", SGF_IN_OUT128)
#undef SGF_WGMMA
#undef SGF_MMA
#undef SGF_IN_OUT128
#undef SGF_IN_OUT120
#undef SGF_IN_OUT112
#undef SGF_IN_OUT104
#undef SGF_IN_OUT96
#undef SGF_IN_OUT80
#undef SGF_IN_OUT64
#undef SGF_IN_OUT16
#undef SGF_IN_OUT8
#undef SGF_LIST128
#undef SGF_LIST120
#undef SGF_LIST112
#undef SGF_LIST104
#undef SGF_LIST96
#undef SGF_LIST80
#undef SGF_LIST64

// Orders the accumulators before the tensor cores' first access to them.
__device__ __forceinline__ void fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Returns when all but the last kPending commits have ended.
template <int kPending>
__device__ __forceinline__ void wait_for_tensor_cores() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// How many registers a thread of this warpgroup has from here on: fewer, or more of those that others gave back.
template <int kRegisters>
__device__ __forceinline__ void give_registers_back() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Named barrier 1 of two warpgroups: one passes it on, the other waits for it.
__device__ __forceinline__ void pass_on() { asm volatile("bar.arrive 1, 256;" ::: "memory"); }

__device__ __forceinline__ void wait_for_turn() { asm volatile("bar.sync 1, 256;" ::: "memory"); }

// Keeps what the compiler does with the accumulators on its side of this point: the wait for the tensor cores does not
// name them.
template <int kAccumulators>
__device__ __forceinline__ void pin(float (&d)[kAccumulators]) {
#pragma unroll
  for (int c = 0; c < kAccumulators; ++c) asm volatile("" : "+f"(d[c])::"memory");
}

}  // namespace sgf
