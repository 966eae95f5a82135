#include "cpu/parallel.h"

#include <dlfcn.h>
#include <sched.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

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

const OpenMP& openmp() {
  static const OpenMP found = find_openmp();
  return found;
}

struct Region {
  int parts;
  void (*task)(void*, int);
  void* argument;
};

void run_share(void* data) {
  const Region& region = *static_cast<Region*>(data);
  const int step = openmp().threads();
  for (int part = openmp().thread(); part < region.parts; part += step) region.task(region.argument, part);
}

struct Team {
  void (*task)(void*, int, int);
  void* argument;
};

void run_member(void* data) {
  const Team& team = *static_cast<Team*>(data);
  team.task(team.argument, openmp().thread(), openmp().threads());
}

}  // namespace

void sgf::run_team(int threads, void (*task)(void*, int, int), void* argument) {
  if (threads > 1 && openmp().found()) {
    Team team{task, argument};
    openmp().parallel(&run_member, &team, static_cast<unsigned>(threads), 0);
  } else {
    task(argument, 0, 1);
  }
}

void sgf::Barrier::pause(int spins) {
  constexpr int kSpins = 2000;  // some ten microseconds
  if (spins >= kSpins) {
    sched_yield();
    return;
  }
#if defined(__x86_64__)
  _mm_pause();
#endif
}

void sgf::run_parts(int parts, void (*task)(void*, int), void* argument) {
  if (parts > 1 && openmp().found()) {
    Region region{parts, task, argument};
    openmp().parallel(&run_share, &region, static_cast<unsigned>(parts), 0);
  } else {
    for (int part = 0; part < parts; ++part) task(argument, part);
  }
}
