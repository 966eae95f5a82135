// The entry of covariance_ on CPUs, and its variant for any machine.
#include "cpu/covariance.h"

#include "cpu/isa.h"

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

}  // namespace sgf

int64_t sgf_covariance_workspace(int64_t N, int64_t D, int threads) {
  using namespace sgf;
  const int64_t words = quotient_up(smaller(N, kChunk), kBlock) * kBlock * quotient_up(D, kPanel) * kPanel;
  return static_cast<int64_t>(sizeof(float)) * (threads * kTile * kTile * kPanel * kPanel + words);
}

int sgf_covariance(void* acc, int acc_dtype, int64_t acc_stride, const void* x, int dtype, int64_t x_stride,
                   const int64_t* rows, const float* row_scale, int64_t N, int64_t D, int threads, void* workspace) {
  sgf::Kernel* const kernel = sgf::kernel();
  if (kernel == nullptr) return SGF_UNKNOWN_CPU_ISA;
  kernel({acc, acc_dtype, acc_stride, x, dtype, x_stride, rows, row_scale, N, D, threads, workspace});
  return SGF_OK;
}
