#include "cpu/linear.h"

#include <type_traits>

#include "cpu/isa.h"

namespace sgf {

namespace {

constexpr Variant<void(const Linear&)> kVariants[] = {
    {"baseline", &run_linear},
#if defined(__x86_64__)
    {"avx2", &linear_avx2},
    {"avx512", &linear_avx512},
    {"avx512bf16", &linear_avx512bf16},
#endif
};

constexpr int64_t kRows = 64;  // of a, in one go: they stay in L2 while the weights pass by

int64_t fewer(int64_t a, int64_t b) { return a < b ? a : b; }

// A pointer to row m, or null.
template <class T>
T* row(T* matrix, int64_t m, int64_t stride, int64_t element_size) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  return matrix == nullptr ? nullptr : reinterpret_cast<Byte*>(matrix) + m * stride * element_size;
}

int run(const Linear& call) {
  static const auto kernel = choose(kVariants);
  if (kernel == nullptr) return SGF_UNKNOWN_CPU_ISA;
  const int64_t size = call.dtype == SGF_FLOAT32 ? 4 : 2;
  for (int64_t m = 0; m < call.M; m += kRows) {
    Linear block = call;
    block.M = fewer(kRows, call.M - m);
    for (Term& term : block.terms) term.a = row(term.a, m, term.a_stride, size);
    block.residual = row(call.residual, m, call.residual_stride, size);
    block.y = row(call.y, m, call.out, size);
    if (call.sumsq != nullptr) block.sumsq += m;
    if (call.sumsq_of_y != nullptr) block.sumsq_of_y += m;
    kernel(block);
  }
  return SGF_OK;
}

}  // namespace
}  // namespace sgf

int64_t sgf_linear_workspace(int64_t M, int64_t n, int64_t K, int64_t K2) {
  return static_cast<int64_t>(sizeof(float)) * sgf::workspace_floats(sgf::fewer(M, sgf::kRows), n, K, K2);
}

int sgf_norm_linear(int dtype, int64_t M, int64_t n, int64_t K, const void* h, int64_t h_stride, const void* weight,
                    int64_t weight_row_stride, int64_t weight_column_stride, const void* product,
                    int64_t product_stride, const void* bias, double eps, double full_width, const float* sumsq,
                    int activation, int64_t unscaled, void* y, int threads, void* workspace) {
  sgf::Linear call = {};
  call.dtype = dtype, call.threads = threads, call.M = M, call.n = n;
  call.terms[0] = {h, h_stride, weight, weight_row_stride, weight_column_stride, K};
  call.terms_used = product == nullptr ? 1 : 0;
  call.residual = product, call.residual_stride = product_stride;
  call.bias = bias;
  call.scaled = true, call.sumsq = sumsq, call.eps = eps, call.width = full_width;
  call.activation = activation, call.unscaled = unscaled;
  call.y = y, call.out = (activation == SGF_SILU_GATE ? (n - unscaled) / 2 : n - unscaled) + unscaled;
  call.workspace = static_cast<float*>(workspace);
  return sgf::run(call);
}

int sgf_residual_linear(int dtype, int64_t M, int64_t n, int64_t K, const void* a, int64_t a_stride, const void* weight,
                        int64_t weight_row_stride, int64_t weight_column_stride, const void* bias, const void* residual,
                        int64_t residual_stride, int64_t K2, const void* a2, int64_t a2_stride, const void* weight2,
                        int64_t weight2_row_stride, int64_t weight2_column_stride, void* y, float* sumsq, int threads,
                        void* workspace) {
  sgf::Linear call = {};
  call.dtype = dtype, call.threads = threads, call.M = M, call.n = n;
  call.terms[0] = {a, a_stride, weight, weight_row_stride, weight_column_stride, K};
  call.terms[1] = {a2, a2_stride, weight2, weight2_column_stride, weight2_row_stride, K2};  // weight2 is [K2, n]
  call.terms_used = a2 == nullptr ? 1 : 2;
  call.bias = bias;
  call.residual = residual, call.residual_stride = residual_stride;
  call.y = y, call.out = n;
  call.sumsq_of_y = sumsq;
  call.workspace = static_cast<float*>(workspace);
  return sgf::run(call);
}
