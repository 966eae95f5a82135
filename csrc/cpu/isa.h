// Choice among the variants of one kernel, compiled for several instruction sets.
#pragma once

#include <cstddef>
#include <cstring>

#include "slicegpt_fast.h"

namespace sgf {

template <class Kernel>
struct Variant {
  const char* isa;  // a level of isa.cpp
  Kernel* kernel;
};

// The strongest of `variants`, which stand weakest first and begin with "baseline", that sgf_cpu_isa() allows: null
// where SLICEGPT_FAST_CPU_ISA names no level.
template <class Kernel, std::size_t n>
Kernel* choose(const Variant<Kernel> (&variants)[n]) {
  Kernel* chosen = nullptr;
  std::size_t next = 0;
  for (int level = 0; level <= sgf_cpu_isa(); ++level) {
    if (next < n && std::strcmp(variants[next].isa, sgf_cpu_isa_name(level)) == 0) chosen = variants[next++].kernel;
  }
  return chosen;
}

}  // namespace sgf
