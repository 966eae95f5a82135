// The entry of covariance_ on CPUs, and its variant for any machine.
#include "cpu/covariance.h"

#include "cpu/isa.h"
#include "cpu/workspace.h"

namespace sgf {

using Kernel = void(const Covariance&);

static void covariance_baseline(const Covariance& call) { run(call); }
#if defined(__x86_64__)
Kernel covariance_avx2, covariance_avx512, covariance_avx512bf16;
#endif

static Kernel* kernel() {
  static constexpr Variant<Kernel> kVariants[] = {
      {"baseline", covariance_baseline},
#if defined(__x86_64__)
      {"avx2", covariance_avx2},
      {"avx512", covariance_avx512},
      {"avx512bf16", covariance_avx512bf16},
#endif
  };
  static Kernel* const chosen = choose(kVariants);
  return chosen;
}

static int64_t workspace_floats(const Covariance& call) {
  const int64_t words = ceil_div(smaller(call.N, kChunk), kBlock) * kBlock * ceil_div(call.D, kPanel) * kPanel;
  return call.threads * kTile * kTile * kPanel * kPanel + words;
}

}  // namespace sgf

int sgf_covariance(sgf_matrix acc, sgf_matrix x, sgf_matrix row_scale, sgf_matrix selected, int acc_dtype, int dtype,
                   int threads) {
  using namespace sgf;
  Kernel* const kernel = sgf::kernel();
  if (kernel == nullptr) return SGF_UNKNOWN_CPU_ISA;
  Covariance call = {};
  call.acc = acc, call.x = x;
  call.row_scale = static_cast<const float*>(row_scale.data);
  call.rows = static_cast<const int64_t*>(selected.data);
  call.N = selected.data == nullptr ? x.rows : selected.columns, call.D = x.columns;
  call.acc_dtype = acc_dtype, call.dtype = dtype, call.threads = threads;
  const Workspace memory = workspace(workspace_floats(call));
  if (memory == nullptr) return SGF_OUT_OF_MEMORY;
  call.workspace = memory.get();
  kernel(call);
  return SGF_OK;
}
