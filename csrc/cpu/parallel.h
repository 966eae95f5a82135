// CPU kernels run on the OpenMP threads that torch already has.
//
// A second runtime would bring a second pool whose waiting threads spin against torch's. So this library links none: it
// looks up, in the running process, the entry point that GCC's, LLVM's and Intel's OpenMP runtimes all export. Where
// there is none (a program without torch) everything runs on the calling thread.
#pragma once

#include <type_traits>

namespace sgf {

// Calls task(argument, part) once for every part in [0, parts), part p on thread p modulo the number of threads that
// the runtime grants. What a part does must not depend on which thread runs it: then the same `parts` give the same
// bits.
void run_parts(int parts, void (*task)(void* argument, int part), void* argument);

template <class Task>
void parallel(int parts, Task&& task) {
  using Plain = std::remove_reference_t<Task>;
  run_parts(parts, [](void* argument, int part) { (*static_cast<Plain*>(argument))(part); }, &task);
}

}  // namespace sgf
