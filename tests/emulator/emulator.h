// Runs CUDA kernels on the CPU, from their own source: for tests on machines without a GPU.
//
// A kernel's file is compiled as C++ against the headers beside this one, which stand in for CUDA's and for the only
// file of csrc/cuda that holds instructions, cuda/instructions.cuh. Every thread of a block is a fiber, every block of
// a cluster a thread of the system (so that `__shared__` can be thread_local), and one of all fibers runs at a time.
// Fibers change only where a kernel waits. Who goes on, and when copies land, is drawn at random; the tensor cores do
// their work as late as they may. A kernel that waits for too little gives wrong results sooner or later, and one that
// waits for what never comes fails at once.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

namespace emulator {

struct Index {
  unsigned x = 1, y = 1, z = 1;
};

struct Launch {
  Index grid, block, cluster;
  size_t dynamic_bytes = 0;
  bool early = false;  // may begin before the previous kernel has ended
};

// Where the calling fiber stands.
struct Here {
  Index thread, block;
};
const Here& here();
const Launch& launched();

// Runs the kernel for every thread. The empty string, or what went wrong.
std::string run(const Launch& launch, const std::function<void()>& kernel);

// Ends the launch.
[[noreturn]] void fail(const std::string& what);

// Lets others run until `ready`.
void wait_until(const std::function<bool()>& ready);

// What happens some time later, before anything that waits for it.
void later(std::function<void()> action);

// A meeting of `count` threads of this block: `id` is a named barrier, 0 stands for all threads that have not ended.
void meet(int id, int count);
void meet_without_waiting(int id, int count);

// The 32 lanes of this warp, or the 128 of this warpgroup, meet and show each other something; returns what all showed.
constexpr int kWarp = 32, kWarpgroup = 128;
void* const* exchange(int lanes, void* shown);

// Shared memory: 32-bit addresses, which mean the same place in every block of the cluster.
uint32_t shared_address(const void* pointer);
uint8_t* shared_pointer(uint32_t address);            // in this block
uint8_t* shared_pointer(uint32_t address, int rank);  // in another block of the cluster
uint8_t* dynamic_shared();

// Barriers of the cluster.
void cluster_arrive();
void cluster_wait();
int cluster_rank();

// Barriers in shared memory, by their place.
void barrier_init(uint8_t* barrier, int arrivals);
void barrier_arrive(uint8_t* barrier, int64_t expected_bytes);
void barrier_complete(uint8_t* barrier, int64_t bytes);
void barrier_wait(uint8_t* barrier, int parity);

// The tensor cores' work of this warpgroup, done when it is waited for: all but the last `pending` commits.
void tensor_cores(std::function<void()> work);
void tensor_cores_commit();
void tensor_cores_wait(int pending);

// griddepcontrol.wait: until then a kernel that was launched early must touch nothing.
void previous_ended();

float half_to_float(uint16_t bits);
uint16_t float_to_half(float value);
float bfloat16_to_float(uint16_t bits);
uint16_t float_to_bfloat16(float value);

}  // namespace emulator
