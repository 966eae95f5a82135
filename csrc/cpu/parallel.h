// CPU kernels run on the OpenMP threads that torch already has.
//
// A second runtime would bring a second pool whose waiting threads spin against torch's. So this library links none: it
// looks up, in the running process, the entry point that GCC's, LLVM's and Intel's OpenMP runtimes all export. Where
// there is none (a program without torch) everything runs on the calling thread.
#pragma once

#include <atomic>
#include <type_traits>

namespace sgf {

// Calls task(argument, part) once for every part in [0, parts), part p on thread p modulo the number of threads that
// the runtime grants. What a part does must not depend on which thread runs it: then the same `parts` give the same
// bits.
void run_parts(int parts, void (*task)(void* argument, int part), void* argument);

// Calls task(argument, part, parts) once on each thread of a team, all at the same time: of `threads`, or of as many as
// the runtime grants.
void run_team(int threads, void (*task)(void* argument, int part, int parts), void* argument);

template <class Task>
void parallel(int parts, Task&& task) {
  using Plain = std::remove_reference_t<Task>;
  run_parts(parts, [](void* argument, int part) { (*static_cast<Plain*>(argument))(part); }, &task);
}

template <class Task>
void team(int threads, Task&& task) {
  using Plain = std::remove_reference_t<Task>;
  run_team(threads, [](void* argument, int part, int parts) { (*static_cast<Plain*>(argument))(part, parts); }, &task);
}

// Where the threads of a team wait for each other: they spin, for microseconds if each has a core of its own, and let
// others run where the wait is long.
class Barrier {
 public:
  void wait(int parts) {
    const unsigned round = round_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == parts) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; round_.load(std::memory_order_acquire) == round; ++spins) pause(spins);
  }

 private:
  static void pause(int spins);

  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<unsigned> round_{0};
};

}  // namespace sgf
