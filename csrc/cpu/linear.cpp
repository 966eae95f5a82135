#include "cpu/linear.h"

#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/workspace.h"

namespace sgf {

namespace {

constexpr Variant<const LinearKernel> kVariants[] = {
    {"baseline", &kLinear},
#if defined(__x86_64__)
    {"avx2", &kLinearAvx2},
    {"avx512", &kLinearAvx512},
    {"avx512bf16", &kLinearAvx512Bf16},
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

int run(const Linear& call, int threads) {
  const LinearKernel* const kernel = linear_kernel();
  if (kernel == nullptr) return SGF_UNKNOWN_CPU_ISA;
  const int64_t most = call.M < kRows ? call.M : kRows;
  const Workspace memory = workspace(workspace_floats(most, call));
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
    const int parts = linear_parts(call.n, threads);
    kernel->prepare(block);
    parallel(parts, [&](int part) { kernel->share(block, part, parts); });
    kernel->finish(block);
  }
  return SGF_OK;
}

}  // namespace

const LinearKernel* linear_kernel() {
  static const LinearKernel* const kernel = choose(kVariants);
  return kernel;
}

Linear norm_linear(sgf_matrix h, sgf_matrix weight, sgf_matrix scales, sgf_matrix bias, sgf_matrix sumsq,
                   sgf_matrix product, sgf_matrix y, int64_t unscaled, double eps, double full_width, int activation,
                   int weight_dtype, int dtype) {
  Linear call = {};
  call.dtype = dtype, call.M = h.rows, call.n = weight.rows;
  call.terms[0] = {h, weight, scales, h.columns, weight_dtype};
  call.terms_used = product.data == nullptr ? 1 : 0;
  call.residual = product;
  call.bias = bias.data;
  call.scaled = true, call.sumsq = static_cast<const float*>(sumsq.data), call.eps = eps, call.width = full_width;
  call.activation = activation, call.unscaled = unscaled, call.unscaled_factor = 1;
  call.y = y;
  return call;
}

Linear residual_linear(sgf_matrix a, sgf_matrix weight, sgf_matrix scales, sgf_matrix bias, sgf_matrix residual,
                       sgf_matrix a2, sgf_matrix weight2, sgf_matrix y, sgf_matrix sumsq, int weight_dtype, int dtype) {
  Linear call = {};
  call.dtype = dtype, call.M = y.rows, call.n = y.columns;
  call.terms[0] = {a, weight, scales, a.columns, weight_dtype};
  call.terms[1] = {a2, transposed(weight2), {}, a2.columns, dtype};  // weight2 is [K2, n]
  call.terms_used = a.data == nullptr ? 0 : a2.data == nullptr ? 1 : 2;
  call.bias = bias.data;
  call.residual = residual;
  call.y = y;
  call.sumsq_of_y = static_cast<float*>(sumsq.data);
  return call;
}

}  // namespace sgf

int sgf_norm_linear(sgf_matrix h, sgf_matrix weight, sgf_matrix scales, sgf_matrix bias, sgf_matrix sumsq,
                    sgf_matrix product, sgf_matrix y, int64_t unscaled, double eps, double full_width, int activation,
                    int weight_dtype, int dtype, int threads) {
  return sgf::run(sgf::norm_linear(h, weight, scales, bias, sumsq, product, y, unscaled, eps, full_width, activation,
                                   weight_dtype, dtype),
                  threads);
}

int sgf_residual_linear(sgf_matrix a, sgf_matrix weight, sgf_matrix scales, sgf_matrix bias, sgf_matrix residual,
                        sgf_matrix a2, sgf_matrix weight2, sgf_matrix y, sgf_matrix sumsq, int weight_dtype, int dtype,
                        int threads) {
  return sgf::run(sgf::residual_linear(a, weight, scales, bias, residual, a2, weight2, y, sumsq, weight_dtype, dtype),
                  threads);
}

int sgf_dequantize(sgf_matrix weight, sgf_matrix scales, sgf_matrix y, int weight_dtype, int dtype, int threads) {
  const sgf::LinearKernel* const kernel = sgf::linear_kernel();
  if (kernel == nullptr) return SGF_UNKNOWN_CPU_ISA;
  sgf::parallel(threads, [&](int part) {
    const int64_t begin = part * y.rows / threads, end = (part + 1) * y.rows / threads;
    kernel->dequantize(weight, scales, y, begin, end, weight_dtype, dtype);
  });
  return SGF_OK;
}
