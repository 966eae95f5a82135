#include "cpu/linear.h"

#include "cpu/isa.h"
#include "cpu/workspace.h"

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

// That many rows of the matrix, from row m on.
sgf_matrix rows(sgf_matrix matrix, int64_t m, int64_t count, int64_t element_size) {
  if (matrix.data == nullptr) return matrix;
  matrix.data = static_cast<char*>(matrix.data) + m * matrix.row_stride * element_size;
  matrix.rows = count;
  return matrix;
}

sgf_matrix transposed(const sgf_matrix& matrix) {
  return {matrix.data, matrix.columns, matrix.rows, matrix.column_stride, matrix.row_stride};
}

int run(const Linear& call) {
  static const auto kernel = choose(kVariants);
  if (kernel == nullptr) return SGF_UNKNOWN_CPU_ISA;
  const int64_t most = call.M < kRows ? call.M : kRows;
  const Workspace memory = workspace(workspace_floats(most, call.n, call.terms[0].K, call.terms[1].K));
  if (memory == nullptr) return SGF_OUT_OF_MEMORY;
  const int64_t size = call.dtype == SGF_FLOAT32 ? 4 : 2;
  for (int64_t m = 0; m < call.M; m += kRows) {
    Linear block = call;
    block.M = call.M - m < kRows ? call.M - m : kRows;
    for (Term& term : block.terms) term.a = rows(term.a, m, block.M, size);
    block.residual = rows(call.residual, m, block.M, size);
    block.y = rows(call.y, m, block.M, size);
    if (call.sumsq != nullptr) block.sumsq += m;
    if (call.sumsq_of_y != nullptr) block.sumsq_of_y += m;
    block.workspace = memory.get();
    kernel(block);
  }
  return SGF_OK;
}

}  // namespace
}  // namespace sgf

int sgf_norm_linear(sgf_matrix h, sgf_matrix weight, sgf_matrix bias, sgf_matrix sumsq, sgf_matrix product,
                    sgf_matrix y, int64_t unscaled, double eps, double full_width, int activation, int dtype,
                    int threads) {
  sgf::Linear call = {};
  call.dtype = dtype, call.threads = threads, call.M = h.rows, call.n = weight.rows;
  call.terms[0] = {h, weight, h.columns};
  call.terms_used = product.data == nullptr ? 1 : 0;
  call.residual = product;
  call.bias = bias.data;
  call.scaled = true, call.sumsq = static_cast<const float*>(sumsq.data), call.eps = eps, call.width = full_width;
  call.activation = activation, call.unscaled = unscaled;
  call.y = y;
  return sgf::run(call);
}

int sgf_residual_linear(sgf_matrix a, sgf_matrix weight, sgf_matrix bias, sgf_matrix residual, sgf_matrix a2,
                        sgf_matrix weight2, sgf_matrix y, sgf_matrix sumsq, int dtype, int threads) {
  sgf::Linear call = {};
  call.dtype = dtype, call.threads = threads, call.M = y.rows, call.n = y.columns;
  call.terms[0] = {a, weight, a.columns};
  call.terms[1] = {a2, sgf::transposed(weight2), a2.columns};  // weight2 is [K2, n]
  call.terms_used = a.data == nullptr ? 0 : a2.data == nullptr ? 1 : 2;
  call.bias = bias.data;
  call.residual = residual;
  call.y = y;
  call.sumsq_of_y = static_cast<float*>(sumsq.data);
  return sgf::run(call);
}
