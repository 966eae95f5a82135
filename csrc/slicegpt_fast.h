// The native core of slicegpt-fast: a flat C interface that knows neither torch nor Python.
//
// Conventions, for every function here:
//   * arguments come in one order: operands, sizes, scalars, dtypes, what the launch works with (splits, workspace,
//     counters), and what it runs on (threads or a stream);
//   * an operand is an sgf_matrix, the caller's memory; a size is 64-bit unless its kernel bounds it;
//   * a function that can fail returns a status: 0 is success, a negative value one of SGF_* below, a positive value a
//     cudaError_t; sgf_status_text() puts any of them into words;
//   * a CUDA launcher takes the stream as the number that a cudaStream_t is, returns once the kernel is enqueued, and
//     leaves choosing the device to the caller. No function that is not named sgf_cuda_* touches the CUDA runtime.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum {
  SGF_OK = 0,
  SGF_UNKNOWN_CPU_ISA = -1,
  SGF_OUT_OF_MEMORY = -2,
  SGF_CUDA_BAD_ARGUMENT = -101,
  SGF_CUDA_MISALIGNED = -102,
  SGF_CUDA_OTHER_DEVICE = -103,
  SGF_CUDA_WORKSPACE = -104,
};

// Element types.
enum {
  SGF_FLOAT32 = 0,
  SGF_FLOAT16 = 1,
  SGF_BFLOAT16 = 2,
  SGF_FLOAT64 = 3,
};

// Activations.
enum {
  SGF_NO_ACTIVATION = 0,
  SGF_RELU = 1,
  SGF_GELU = 2,
  SGF_GELU_TANH = 3,
  SGF_SILU_GATE = 4,
};

// An operand: element (i, j) lies at data + i * row_stride + j * column_stride. Strides count elements. A vector is a
// matrix of one row, and contiguous. An operand that is absent has no data and no elements.
typedef struct {
  void* data;
  int64_t rows, columns;
  int64_t row_stride, column_stride;
} sgf_matrix;

// The sentence for a status, in static memory.
const char* sgf_status_text(int status);

// How this library was built: `git describe` (or the release), the C++ compiler, the CUDA compiler (empty: built
// without CUDA) and the CUDA architectures, separated by semicolons.
const char* sgf_revision(void);
const char* sgf_compiler(void);
const char* sgf_cuda_compiler(void);
const char* sgf_cuda_archs(void);

// Instruction-set extensions that both this CPU and the operating system support, out of those that kernels use:
// names as in /proc/cpuinfo, separated by spaces.
const char* sgf_cpu_features(void);

// The instruction-set level that CPU kernels run at, as an index from 0 (the machine's baseline) upwards: the strongest
// supported one, capped by the environment variable SLICEGPT_FAST_CPU_ISA (read once). Negative: a status.
int sgf_cpu_isa(void);
int sgf_cpu_isa_count(void);
const char* sgf_cpu_isa_name(int level);

// covariance_ on the CPU: acc [D, D] += X^T X, X being rows of x [N, D]: those that `selected`, a vector of int64,
// numbers, or all where it is absent, each times its row_scale (fp32) where that is not absent. Reads the lower
// triangle of acc and writes both. acc_dtype is SGF_FLOAT64 or SGF_FLOAT32, dtype anything else. Rows of acc and x are
// contiguous. The sums over 2048 rows (bf16 without row_scale: 4096) must lie in fp32's range. The number of threads
// changes no bit of the result.
int sgf_covariance(sgf_matrix acc, sgf_matrix x, sgf_matrix row_scale, sgf_matrix selected, int acc_dtype, int dtype,
                   int threads);

// norm_linear and residual_linear on the CPU, as slicegpt_fast/ops/ describes them. Rows of h, a, a2, residual and
// product are contiguous, weights have a stride of 1 in one direction, y is contiguous, sumsq is fp32. May be absent:
// bias; sumsq of norm_linear, which then computes it; product, which is h weight^T [M, n] where somebody else has
// computed that; residual; a2 with weight2 [K2, n]; a with weight, where residual already holds their product.
int sgf_norm_linear(sgf_matrix h, sgf_matrix weight, sgf_matrix bias, sgf_matrix sumsq, sgf_matrix product,
                    sgf_matrix y, int64_t unscaled, double eps, double full_width, int activation, int dtype,
                    int threads);
int sgf_residual_linear(sgf_matrix a, sgf_matrix weight, sgf_matrix bias, sgf_matrix residual, sgf_matrix a2,
                        sgf_matrix weight2, sgf_matrix y, sgf_matrix sumsq, int dtype, int threads);

#ifdef SGF_CUDA
// Writes {blockDim.x, __CUDA_ARCH__ of the code that ran} to `out`, two int32, from a launch with `threads` threads:
// shows which of the compiled architectures a GPU picks.
int sgf_cuda_probe(sgf_matrix out, int threads, uintptr_t stream);

const char* sgf_cuda_status_text(int status);

// What a launch needs from its caller: `splits`, the number of blocks that share a tile, `workspace` fp32 cells on a
// 16-byte boundary, and `counters` int32 cells that hold zero, which is what they hold again when the kernel has ended.
// A plan serves whichever architecture's code the GPU runs; the decode kernels' code for 9.0 leaves most of it
// untouched.
typedef struct {
  int splits;
  int64_t workspace, counters;
} sgf_cuda_plan;

// norm_linear and residual_linear of slicegpt_fast/ops for 1 <= M <= 16 rows of fp16 or bf16, on compute capability 8.0
// and later. Rows are contiguous, sumsq is fp32; bias, sumsq (of norm_linear) and residual may be absent. The plan is
// for the same sizes and a GPU of `sms` multiprocessors. All operands lie on the current device.
sgf_cuda_plan sgf_cuda_norm_linear_plan(int M, int64_t scaled, int64_t unscaled, int K, int activation, int sms);
int sgf_cuda_norm_linear(sgf_matrix h, sgf_matrix weight, sgf_matrix bias, sgf_matrix sumsq, sgf_matrix y,
                         int64_t unscaled, double eps, double full_width, int activation, int dtype, int splits,
                         sgf_matrix workspace, sgf_matrix counters, uintptr_t stream);

// a2 [M, K2] and weight2 [K2, n] are the shortcut's pair, or absent. Of weight2 either rows or columns are contiguous.
sgf_cuda_plan sgf_cuda_residual_linear_plan(int M, int64_t n, int K, int K2, int sms);
int sgf_cuda_residual_linear(sgf_matrix a, sgf_matrix weight, sgf_matrix bias, sgf_matrix residual, sgf_matrix a2,
                             sgf_matrix weight2, sgf_matrix y, sgf_matrix sumsq, int dtype, int splits,
                             sgf_matrix workspace, sgf_matrix counters, uintptr_t stream);

#ifdef SGF_SM90A
// covariance_ of slicegpt_fast/ops on compute capability 9.0: acc [D, D], fp32 or fp64, symmetric, += X^T X for the
// scaled and selected rows of x [N, D] in fp16 or bf16. row_scale (fp32) and mask (bytes) may be absent. `planes` is
// room for a prepared copy of x, [N, D rounded up to 8] elements, three of them with a row scale; it may be absent
// where there is neither scale nor mask, x is 16-byte aligned and its row stride is a multiple of 8 and at least D.
sgf_cuda_plan sgf_cuda_covariance_plan(int64_t N, int64_t D, int sms);
int sgf_cuda_covariance(sgf_matrix acc, sgf_matrix x, sgf_matrix row_scale, sgf_matrix mask, int acc_dtype, int dtype,
                        int splits, sgf_matrix planes, sgf_matrix workspace, uintptr_t stream);

// norm_linear and residual_linear of slicegpt_fast/ops for many rows, on compute capability 9.0 with `sms`
// multiprocessors. h, weight, a, a2 and weight2 are 16-byte aligned and their strides multiples of 8 elements; nothing
// is asked of the others. sumsq of norm_linear may be absent where no row is scaled; sgf_cuda_row_squares computes it.
// The workspace of residual_linear holds as many fp32 cells as the function for that says.
int sgf_cuda_row_squares(sgf_matrix h, sgf_matrix sumsq, int dtype, uintptr_t stream);
int sgf_cuda_norm_linear_prefill(sgf_matrix h, sgf_matrix weight, sgf_matrix bias, sgf_matrix sumsq, sgf_matrix y,
                                 int64_t unscaled, double eps, double full_width, int activation, int dtype, int sms,
                                 uintptr_t stream);
int64_t sgf_cuda_residual_linear_prefill_workspace(int M, int n);
int sgf_cuda_residual_linear_prefill(sgf_matrix a, sgf_matrix weight, sgf_matrix bias, sgf_matrix residual,
                                     sgf_matrix a2, sgf_matrix weight2, sgf_matrix y, sgf_matrix sumsq, int dtype,
                                     int sms, sgf_matrix workspace, uintptr_t stream);
#endif
#endif

#ifdef __cplusplus
}
#endif
