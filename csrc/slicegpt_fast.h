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

// Element types. Those below 16 bits are of weights with scales, as slicegpt_fast/ops/quantized.py describes them;
// SGF_INT4 stands for bytes of two levels each.
enum {
  SGF_FLOAT32 = 0,
  SGF_FLOAT16 = 1,
  SGF_BFLOAT16 = 2,
  SGF_FLOAT64 = 3,
  SGF_INT8 = 4,
  SGF_INT4 = 5,
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
// product are contiguous, weights have a stride of 1 in one direction, y is contiguous, sumsq is fp32. Rows of a weight
// of SGF_INT8 or SGF_INT4 are contiguous, and those of its scales; others have none. May be absent: bias; sumsq of
// norm_linear, which then computes it; product, which is h weight^T [M, n] where somebody else has computed that;
// residual; a2 with weight2 [K2, n]; a with weight, where residual already holds their product.
int sgf_norm_linear(sgf_matrix h, sgf_matrix weight, sgf_matrix scales, sgf_matrix bias, sgf_matrix sumsq,
                    sgf_matrix product, sgf_matrix y, int64_t unscaled, double eps, double full_width, int activation,
                    int weight_dtype, int dtype, int threads);
int sgf_residual_linear(sgf_matrix a, sgf_matrix weight, sgf_matrix scales, sgf_matrix bias, sgf_matrix residual,
                        sgf_matrix a2, sgf_matrix weight2, sgf_matrix y, sgf_matrix sumsq, int weight_dtype, int dtype,
                        int threads);

// y [n, K] = the weight that integers and scales stand for, each product rounded once. y is contiguous.
int sgf_dequantize(sgf_matrix weight, sgf_matrix scales, sgf_matrix y, int weight_dtype, int dtype, int threads);

// attend on the CPU, as slicegpt_fast/ops/attend.py describes it. An operand of heads has one row per token of the
// batch and one column per head: the first of its numbers, which are contiguous. cosine and sine are [tokens or batch
// tokens, rotated numbers]; keys and values hold one row per sequence and key-value head: `size` numbers a position.
// `mask` is bool, [tokens or batch tokens, positions]. May be absent: cosine with sine, the norms' weights, the mask.
// The new tokens are written from position `start` on.
int sgf_attend(sgf_matrix queries, sgf_matrix new_keys, sgf_matrix new_values, sgf_matrix cosine, sgf_matrix sine,
               sgf_matrix query_norm, sgf_matrix key_norm, sgf_matrix keys, sgf_matrix values, sgf_matrix mask,
               sgf_matrix y, int64_t batch, int64_t size, int64_t rank, int64_t start, double eps, double scale,
               int dtype, int threads);

// Decode programs on the CPU: the ops of a run of decoder layers, laid down once and run as one. Operands are those of
// the ops; the activations among them are memory for the most rows that a run will have, rows contiguous; nothing is
// copied. norm_linear may have a norm's weight, by which h is multiplied once it is normalised, and gives its unscaled
// columns with the opposite sign. `layer` counts the program's attends; every one needs a cache before the first run.
// The caches hold `start` positions, from position `first` of their memory on.
typedef struct sgf_program sgf_program;
sgf_program* sgf_program_new(void);
void sgf_program_delete(sgf_program* program);
int sgf_program_norm_linear(sgf_program* program, sgf_matrix h, sgf_matrix weight, sgf_matrix scales,
                            sgf_matrix norm_weight, sgf_matrix bias, sgf_matrix y, int64_t unscaled, double eps,
                            double full_width, int activation, int weight_dtype, int dtype);
int sgf_program_residual_linear(sgf_program* program, sgf_matrix a, sgf_matrix weight, sgf_matrix scales,
                                sgf_matrix bias, sgf_matrix residual, sgf_matrix a2, sgf_matrix weight2, sgf_matrix y,
                                int weight_dtype, int dtype);
int sgf_program_attend(sgf_program* program, sgf_matrix queries, sgf_matrix new_keys, sgf_matrix new_values,
                       sgf_matrix query_norm, sgf_matrix key_norm, sgf_matrix y, int64_t size, int64_t rank, double eps,
                       double scale, int dtype);
int sgf_program_cache(sgf_program* program, int64_t layer, sgf_matrix keys, sgf_matrix values);
int sgf_program_run(const sgf_program* program, int64_t batch, int64_t tokens, int64_t first, int64_t start,
                    sgf_matrix cosine, sgf_matrix sine, sgf_matrix mask, int threads);

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

// attend of slicegpt_fast/ops for fp16 or bf16 and heads of at most 256 numbers, on compute capability 8.0 and later:
// operands as of sgf_attend, but for `start`, an int64 on the device, so that a captured launch serves every length.
// The plan is for a cache with room for that many positions.
sgf_cuda_plan sgf_cuda_attend_plan(int64_t batch, int tokens, int heads, int groups, int64_t positions, int sms);
int sgf_cuda_attend(sgf_matrix queries, sgf_matrix new_keys, sgf_matrix new_values, sgf_matrix cosine, sgf_matrix sine,
                    sgf_matrix query_norm, sgf_matrix key_norm, sgf_matrix keys, sgf_matrix values, sgf_matrix mask,
                    sgf_matrix start, sgf_matrix y, int64_t batch, int64_t size, int64_t rank, double eps, double scale,
                    int dtype, int splits, sgf_matrix workspace, sgf_matrix counters, uintptr_t stream);

#ifdef SGF_SM90A
// covariance_ of slicegpt_fast/ops on compute capability 9.0: acc [D, D], fp32 or fp64, symmetric, += X^T X for the
// scaled and selected rows of x [N, D] in fp16 or bf16. row_scale (fp32) and mask (bytes) may be absent. `planes` is
// room for a prepared copy of x, [N, D rounded up to 8] elements, three of them with a row scale; it may be absent
// where there is neither scale nor mask, x is 16-byte aligned and its row stride is a multiple of 8 and at least D.
sgf_cuda_plan sgf_cuda_covariance_plan(int64_t N, int64_t D, int sms);
int sgf_cuda_covariance(sgf_matrix acc, sgf_matrix x, sgf_matrix row_scale, sgf_matrix mask, int acc_dtype, int dtype,
                        int splits, sgf_matrix planes, sgf_matrix workspace, uintptr_t stream);

// What a launch for many rows needs: the width of its tiles, how many clusters of blocks share the k of each, and fp32
// cells of workspace on a 16-byte boundary.
typedef struct {
  int width, splits;
  int64_t workspace;
} sgf_cuda_prefill_plan;

// norm_linear and residual_linear of slicegpt_fast/ops for many rows, on compute capability 9.0 with `sms`
// multiprocessors. h, weight, a, a2 and weight2 are 16-byte aligned and their strides multiples of 8 elements; nothing
// is asked of the others. sumsq of norm_linear may be absent where no row is scaled; sgf_cuda_row_squares computes it.
// Width and splits are those of the plan for the same sizes, or any others that a plan may have.
int sgf_cuda_row_squares(sgf_matrix h, sgf_matrix sumsq, int dtype, uintptr_t stream);
int sgf_cuda_norm_linear_prefill_width(int M, int64_t scaled, int64_t unscaled, int K, int activation, int sms);
int sgf_cuda_norm_linear_prefill(sgf_matrix h, sgf_matrix weight, sgf_matrix bias, sgf_matrix sumsq, sgf_matrix y,
                                 int64_t unscaled, double eps, double full_width, int activation, int dtype, int width,
                                 int sms, uintptr_t stream);
sgf_cuda_prefill_plan sgf_cuda_residual_linear_prefill_plan(int M, int n, int K, int K2, int sms);
int sgf_cuda_residual_linear_prefill(sgf_matrix a, sgf_matrix weight, sgf_matrix bias, sgf_matrix residual,
                                     sgf_matrix a2, sgf_matrix weight2, sgf_matrix y, sgf_matrix sumsq, int dtype,
                                     int width, int splits, int sms, sgf_matrix workspace, uintptr_t stream);
#endif
#endif

#ifdef __cplusplus
}
#endif
