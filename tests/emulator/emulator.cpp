#include "emulator.h"

#include <ucontext.h>

#include <algorithm>
#include <bit>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <thread>
#include <vector>

namespace emulator {
namespace {

constexpr size_t kStackBytes = 128 << 10;
constexpr size_t kSharedBytes = 227 << 10;

struct Meeting {
  int arrived = 0;
  int64_t round = 0;
};

struct Exchange {
  Meeting meeting;
  void* shown[2][kWarpgroup];  // of this round and, for those that have not looked yet, of the one before
};

struct Work {
  std::vector<std::function<void()>> open;
  std::deque<std::vector<std::function<void()>>> committed;
};

struct Fiber {
  Here here;
  int index = 0;
  ucontext_t context;
  std::function<bool()> ready;  // empty: can go on
  bool ended = false, waited_for_previous = false;
  int64_t cluster_round = 0;  // of the cluster's barrier at which it arrived last
};

struct Block {
  int rank = 0;
  std::vector<Fiber> fibers;
  int running = 0;
  std::map<int, Meeting> meetings;
  std::map<std::pair<int, int>, Exchange> exchanges;  // by the number of lanes, and the group
  std::map<int, Work> work;                           // by warpgroup
  std::unique_ptr<char[]> stacks;
  uint8_t* anchor = nullptr;  // a place of this block's shared memory
  ucontext_t scheduler;
};

struct Barrier {
  int arrivals, pending;
  int64_t bytes = 0, phase = 0;
};

// All blocks of one cluster; one of them has the turn.
struct Cluster {
  const Launch* launch;
  const std::function<void()>* kernel;
  std::vector<Block> blocks;
  std::mutex mutex;
  std::condition_variable passed;
  size_t turn = 0, idle = 0;
  std::vector<std::function<void()>> pending;
  std::map<uint8_t*, Barrier> barriers;
  Meeting meeting;
  int running = 0;
  std::string failure;
  std::mt19937 random;
};

thread_local Cluster* cluster;
thread_local Block* block;
thread_local Fiber* fiber;
thread_local uint8_t anchor;
alignas(1024) thread_local uint8_t dynamic[kSharedBytes + 16];

void switch_to_scheduler() { swapcontext(&fiber->context, &block->scheduler); }

void leave(Meeting& meeting, int expected) {
  if (meeting.arrived > 0 && meeting.arrived == expected) meeting.arrived = 0, ++meeting.round;
}

void start_fiber() {
  (*cluster->kernel)();
  if (cluster->launch->early && !fiber->waited_for_previous)
    fail("a thread ended without waiting for the previous kernel");
  fiber->ended = true;
  --block->running;
  --cluster->running;
  leave(block->meetings[0], block->running);  // barriers do not wait for threads that have ended
  leave(cluster->meeting, cluster->running);
  switch_to_scheduler();
}

void arrive(Meeting& meeting, int expected) {
  if (++meeting.arrived == expected) meeting.arrived = 0, ++meeting.round;
}

size_t draw(size_t choices) { return cluster->random() % choices; }

void do_one_pending() {
  const size_t choice = draw(cluster->pending.size());
  std::swap(cluster->pending[choice], cluster->pending.back());
  const auto action = std::move(cluster->pending.back());
  cluster->pending.pop_back();
  action();
}

// Runs each fiber of the block that can go on, in random order; whether there was one.
bool run_fibers(std::vector<Fiber*>& order) {
  bool any = false;
  std::shuffle(order.begin(), order.end(), cluster->random);
  for (Fiber* each : order) {
    if (each->ended || (each->ready && !each->ready())) continue;
    any = true;
    each->ready = nullptr;
    fiber = each;
    swapcontext(&block->scheduler, &each->context);
    if (!cluster->failure.empty()) return true;
    if (!cluster->pending.empty() && draw(4) == 0) do_one_pending();
  }
  return any;
}

void run_block(Cluster& of, size_t index) {
  cluster = &of;
  block = &of.blocks[index];
  std::vector<Fiber*> order;
  for (Fiber& each : block->fibers) {
    order.push_back(&each);
    getcontext(&each.context);
    each.context.uc_stack.ss_sp = block->stacks.get() + each.index * kStackBytes;
    each.context.uc_stack.ss_size = kStackBytes;
    each.context.uc_link = nullptr;
    makecontext(&each.context, start_fiber, 0);
  }
  std::memset(dynamic, 0xff, sizeof(dynamic));
  std::unique_lock lock(of.mutex);
  block->anchor = &anchor;
  const size_t blocks = of.blocks.size();
  // A block whose threads have ended keeps its shared memory until all of the cluster's have.
  for (;;) {
    of.passed.wait(lock, [&] { return of.turn == index || of.running == 0 || !of.failure.empty(); });
    if (of.running == 0 || !of.failure.empty()) break;
    bool placed = true;
    for (Block& each : of.blocks) placed = placed && each.anchor != nullptr;
    if (placed) {
      bool any = false;
      while (run_fibers(order) && of.failure.empty()) any = true;
      of.idle = any ? 0 : of.idle + 1;
      if (of.idle > blocks && of.failure.empty()) {
        if (of.pending.empty()) {
          of.failure = "every thread waits for something that will not happen";
        } else {
          do_one_pending();
          of.idle = 0;
        }
      }
    }
    of.turn = (index + 1) % blocks;
    of.passed.notify_all();
  }
  of.passed.notify_all();
}

void run_cluster(Cluster& of) {
  std::vector<std::thread> threads;
  for (size_t index = 0; index < of.blocks.size(); ++index) threads.emplace_back(run_block, std::ref(of), index);
  for (std::thread& each : threads) each.join();
  if (of.failure.empty() && !of.pending.empty()) of.failure = "the kernel ended before its copies did";
}

}  // namespace

const Here& here() { return fiber->here; }

const Launch& launched() { return *cluster->launch; }

std::string run(const Launch& launch, const std::function<void()>& kernel) {
  static std::mt19937 seeds;
  const Index grid = launch.grid, size = launch.cluster, shape = launch.block;
  const int threads = static_cast<int>(shape.x * shape.y * shape.z);
  if (threads < 1 || threads > 1024) return "a block has 1 to 1024 threads";
  if (grid.x % size.x != 0 || grid.y % size.y != 0 || grid.z % size.z != 0 || size.x * size.y * size.z > 8)
    return "the grid is not made of clusters of up to 8 blocks";
  if (launch.dynamic_bytes > kSharedBytes) return "too much shared memory";

  std::vector<Index> clusters;  // their first blocks
  for (unsigned z = 0; z < grid.z; z += size.z) {
    for (unsigned y = 0; y < grid.y; y += size.y) {
      for (unsigned x = 0; x < grid.x; x += size.x) clusters.push_back({x, y, z});
    }
  }
  std::shuffle(clusters.begin(), clusters.end(), seeds);
  std::vector<std::unique_ptr<char[]>> stacks(size.x * size.y * size.z);
  for (auto& each : stacks) each.reset(new char[threads * kStackBytes]);  // not filled: only what is used costs memory
  for (const Index& first : clusters) {
    Cluster of;
    of.launch = &launch;
    of.kernel = &kernel;
    of.random.seed(seeds());
    of.running = static_cast<int>(size.x * size.y * size.z) * threads;
    of.blocks.resize(size.x * size.y * size.z);
    for (size_t rank = 0; rank < of.blocks.size(); ++rank) {
      Block& each = of.blocks[rank];
      const auto number = static_cast<unsigned>(rank);
      const Index offset{number % size.x, number / size.x % size.y, number / size.x / size.y};
      each.rank = static_cast<int>(rank);
      each.running = threads;
      each.stacks.swap(stacks[rank]);
      each.fibers.resize(threads);
      for (int t = 0; t < threads; ++t) {
        const auto thread = static_cast<unsigned>(t);
        each.fibers[t].index = t;
        each.fibers[t].here.thread = {thread % shape.x, thread / shape.x % shape.y, thread / shape.x / shape.y};
        each.fibers[t].here.block = {first.x + offset.x, first.y + offset.y, first.z + offset.z};
      }
    }
    run_cluster(of);
    if (!of.failure.empty()) return of.failure;
    for (size_t rank = 0; rank < of.blocks.size(); ++rank) of.blocks[rank].stacks.swap(stacks[rank]);
  }
  return "";
}

void fail(const std::string& what) {
  if (cluster->failure.empty()) {
    const Here& at = fiber->here;
    cluster->failure = what + " (block " + std::to_string(at.block.x) + ", " + std::to_string(at.block.y) +
                       ", thread " + std::to_string(at.thread.x) + ")";
  }
  for (;;) switch_to_scheduler();
}

void wait_until(const std::function<bool()>& ready) {
  if (ready()) return;
  fiber->ready = ready;
  switch_to_scheduler();
}

void later(std::function<void()> action) { cluster->pending.push_back(std::move(action)); }

void meet(int id, int count) {
  Meeting& meeting = block->meetings[id];
  const int64_t round = meeting.round;
  arrive(meeting, count == 0 ? block->running : count);
  wait_until([&meeting, round] { return meeting.round != round; });
}

void meet_without_waiting(int id, int count) { arrive(block->meetings[id], count); }

void* const* exchange(int lanes, void* shown) {
  Exchange& here = block->exchanges[{lanes, fiber->index / lanes}];
  const int64_t round = here.meeting.round;
  here.shown[round % 2][fiber->index % lanes] = shown;
  arrive(here.meeting, lanes);
  wait_until([&here, round] { return here.meeting.round != round; });
  return here.shown[round % 2];
}

uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const uint8_t*>(pointer) - dynamic);
}

uint8_t* shared_pointer(uint32_t address) { return dynamic + static_cast<int32_t>(address); }

uint8_t* shared_pointer(uint32_t address, int rank) {
  if (rank < 0 || rank >= static_cast<int>(cluster->blocks.size())) fail("no block of the cluster has this rank");
  if (cluster->blocks[rank].running == 0) fail("the block whose shared memory is meant has ended");
  return cluster->blocks[rank].anchor + (shared_pointer(address) - &anchor);
}

uint8_t* dynamic_shared() { return dynamic + 16; }  // no more aligned than a GPU promises

void cluster_arrive() {
  fiber->cluster_round = cluster->meeting.round;
  arrive(cluster->meeting, cluster->running);
}

void cluster_wait() {
  wait_until([of = cluster, round = fiber->cluster_round] { return of->meeting.round != round; });
}

int cluster_rank() { return block->rank; }

void barrier_init(uint8_t* barrier, int arrivals) { cluster->barriers[barrier] = {arrivals, arrivals}; }

void barrier_arrive(uint8_t* barrier, int64_t expected_bytes) {
  const auto found = cluster->barriers.find(barrier);
  if (found == cluster->barriers.end()) fail("a barrier is used before it is initialised");
  Barrier& at = found->second;
  at.bytes += expected_bytes;
  if (at.pending == 0) fail("more arrivals at a barrier than it counts");
  --at.pending;
  barrier_complete(barrier, 0);
}

void barrier_complete(uint8_t* barrier, int64_t bytes) {
  Barrier& at = cluster->barriers.at(barrier);
  at.bytes -= bytes;
  if (at.pending == 0 && at.bytes == 0) at.pending = at.arrivals, ++at.phase;
}

void barrier_wait(uint8_t* barrier, int parity) {
  Barrier& at = cluster->barriers.at(barrier);
  wait_until([&at, parity] { return at.phase % 2 != parity; });
}

void tensor_cores(std::function<void()> work) {
  block->work[fiber->index / kWarpgroup].open.push_back(std::move(work));
}

void tensor_cores_commit() {
  exchange(kWarpgroup, nullptr);
  if (fiber->index % kWarpgroup == 0) {
    Work& work = block->work[fiber->index / kWarpgroup];
    work.committed.push_back(std::move(work.open));
    work.open.clear();
  }
  exchange(kWarpgroup, nullptr);
}

void tensor_cores_wait(int pending) {
  exchange(kWarpgroup, nullptr);
  if (fiber->index % kWarpgroup == 0) {
    auto& committed = block->work[fiber->index / kWarpgroup].committed;
    for (; static_cast<int>(committed.size()) > pending; committed.pop_front()) {
      for (const auto& work : committed.front()) work();
    }
  }
  exchange(kWarpgroup, nullptr);
}

void previous_ended() { fiber->waited_for_previous = true; }

float half_to_float(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16, magnitude = bits & 0x7fff;
  if (magnitude >= 0x7c00) return std::bit_cast<float>(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  const float scaled = std::bit_cast<float>(magnitude << 13) * 0x1p112f;  // exact, subnormals too
  return std::bit_cast<float>(std::bit_cast<uint32_t>(scaled) | sign);
}

uint16_t float_to_half(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return static_cast<uint16_t>(sign | 0x7fff);
  if (magnitude >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);
  if (magnitude < 0x38800000) {  // subnormal: units of 2^-24, rounded by the addition
    const float units = std::bit_cast<float>(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (std::bit_cast<uint32_t>(units) - 0x3f000000));
  }
  const uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000) >> 13));
}

float bfloat16_to_float(uint16_t bits) { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }

uint16_t float_to_bfloat16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace emulator
