#include "cpu/parallel.h"

#include <dlfcn.h>

namespace {

struct OpenMP {
  void (*parallel)(void (*body)(void*), void* data, unsigned threads, unsigned flags);
  int (*thread)();
  int (*threads)();

  bool found() const { return parallel != nullptr && thread != nullptr && threads != nullptr; }
};

template <class Function>
void look_up(Function*& function, const char* name) {
  function = reinterpret_cast<Function*>(dlsym(RTLD_DEFAULT, name));
}

OpenMP find_openmp() {
  OpenMP openmp;
  look_up(openmp.parallel, "GOMP_parallel");
  look_up(openmp.thread, "omp_get_thread_num");
  look_up(openmp.threads, "omp_get_num_threads");
  return openmp;
}

struct Region {
  const OpenMP& openmp;
  int parts;
  void (*task)(void*, int);
  void* argument;
};

void run_share(void* data) {
  const Region& region = *static_cast<Region*>(data);
  const int step = region.openmp.threads();
  for (int part = region.openmp.thread(); part < region.parts; part += step) region.task(region.argument, part);
}

}  // namespace

void sgf::run_parts(int parts, void (*task)(void*, int), void* argument) {
  static const OpenMP openmp = find_openmp();
  if (parts > 1 && openmp.found()) {
    Region region{openmp, parts, task, argument};
    openmp.parallel(&run_share, &region, static_cast<unsigned>(parts), 0);
  } else {
    for (int part = 0; part < parts; ++part) task(argument, part);
  }
}
