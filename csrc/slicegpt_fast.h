// The native core of slicegpt-fast: a flat C interface that knows neither torch nor Python.
//
// Conventions, for every function here:
//   * pointers, sizes and strides come from the caller, who owns all memory; strides are 64-bit and count elements, and
//     a size is 64-bit unless its kernel bounds it;
//   * a function that can fail returns a status: 0 is success, a negative value one of SGF_* below, a positive value a
//     cudaError_t; sgf_status_text() puts any of them into words;
//   * a CUDA launcher takes the stream as an opaque cudaStream_t, returns once the kernel is enqueued, and leaves
//     choosing the device to the caller. No function that is not named sgf_cuda_* touches the CUDA runtime.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum {
  SGF_OK = 0,
  SGF_UNKNOWN_CPU_ISA = -1,
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

// covariance_ on the CPU: acc [D, D] += X^T X, X being N rows of x: those that `rows` numbers or, where it is null, the
// first, each times its row_scale where that is not null. Reads the lower triangle of acc and writes both. acc_dtype is
// SGF_FLOAT64 or SGF_FLOAT32, dtype anything else. Rows of acc and x lie in one piece. The sums over 2048 rows (bf16
// without row_scale: 4096) must lie in fp32's range. The number of threads changes no bit of the result. The workspace
// has the bytes that sgf_covariance_workspace says and stands on a cache line.
int64_t sgf_covariance_workspace(int64_t N, int64_t D, int threads);
int sgf_covariance(void* acc, int acc_dtype, int64_t acc_stride, const void* x, int dtype, int64_t x_stride,
                   const int64_t* rows, const float* row_scale, int64_t N, int64_t D, int threads, void* workspace);

// norm_linear and residual_linear on the CPU, as slicegpt_fast/ops/ describes them. Rows of h, a, a2, residual and
// product lie in one piece, weights have a stride of 1 in one direction, y [M, ...] is contiguous. Null: bias; sumsq of
// norm_linear, which then computes it; residual; a2 with weight2 [K2, n]; product, or else weight: product is
// h weight^T [M, n], where somebody else has computed that. The workspace has the bytes that sgf_linear_workspace says
// (K2 = 0 for norm_linear) and stands on a cache line.
int64_t sgf_linear_workspace(int64_t M, int64_t n, int64_t K, int64_t K2);
int sgf_norm_linear(int dtype, int64_t M, int64_t n, int64_t K, const void* h, int64_t h_stride, const void* weight,
                    int64_t weight_row_stride, int64_t weight_column_stride, const void* product,
                    int64_t product_stride, const void* bias, double eps, double full_width, const float* sumsq,
                    int activation, int64_t unscaled, void* y, int threads, void* workspace);
int sgf_residual_linear(int dtype, int64_t M, int64_t n, int64_t K, const void* a, int64_t a_stride, const void* weight,
                        int64_t weight_row_stride, int64_t weight_column_stride, const void* bias, const void* residual,
                        int64_t residual_stride, int64_t K2, const void* a2, int64_t a2_stride, const void* weight2,
                        int64_t weight2_row_stride, int64_t weight2_column_stride, void* y, float* sumsq, int threads,
                        void* workspace);

#ifdef SGF_CUDA
// Writes {blockDim.x, __CUDA_ARCH__ of the code that ran} to out[0..1] (device memory) from a launch with `threads`
// threads: shows which of the compiled architectures a GPU picks.
int sgf_cuda_probe(int32_t* out, int threads, void* stream);

const char* sgf_cuda_status_text(int status);

// What a launch needs from its caller: `workspace` fp32 cells on a 16-byte boundary, and `counters` int32 cells that
// hold zero, which is what they hold again when the kernel has ended. `splits` is how many blocks share a tile. A plan
// serves whichever architecture's code the GPU runs; the decode kernels' code for 9.0 leaves most of it untouched.
typedef struct {
  int splits;
  int64_t workspace, counters;
} sgf_cuda_plan;

// norm_linear and residual_linear of slicegpt_fast/ops for 1 <= M <= 16 rows of fp16 or bf16, on compute capability 8.0
// and later. Matrices are row-major; a null bias, sumsq (of norm_linear) or residual is absent. inverse_width is 1 / D.
// The plan is for the same sizes and a GPU of `sms` multiprocessors. All pointers lie on the current device.
sgf_cuda_plan sgf_cuda_norm_linear_plan(int M, int64_t scaled, int64_t unscaled, int K, int activation, int sms);
int sgf_cuda_norm_linear(const void* h, int64_t stride_h, const void* weight, int64_t stride_weight, const void* bias,
                         const float* sumsq, void* y, int64_t stride_y, int M, int64_t scaled, int64_t unscaled, int K,
                         float eps, float inverse_width, int activation, int dtype, sgf_cuda_plan plan,
                         float* workspace, int32_t* counters, void* stream);

// a2 [M, K2] and weight2 are the shortcut's pair, absent where K2 is 0. weight2 is [K2, n] where weight2_along_n is 1,
// and [n, K2], the transposed matrix, where it is 0.
sgf_cuda_plan sgf_cuda_residual_linear_plan(int M, int64_t n, int K, int K2, int sms);
int sgf_cuda_residual_linear(const void* a, int64_t stride_a, const void* weight, int64_t stride_weight, const void* a2,
                             int64_t stride_a2, const void* weight2, int64_t stride_weight2, int weight2_along_n,
                             const void* bias, const void* residual, int64_t stride_residual, void* y, int64_t stride_y,
                             float* sumsq, int M, int64_t n, int K, int K2, int dtype, sgf_cuda_plan plan,
                             float* workspace, int32_t* counters, void* stream);

#ifdef SGF_SM90A
// covariance_ of slicegpt_fast/ops on compute capability 9.0: acc [D, D], fp32 or fp64, symmetric, += X^T X for the
// scaled and selected rows of x [N, D] in fp16 or bf16. row_scale [N] and mask [N] may be null. `planes` is room for a
// prepared copy of x, [N, D rounded up to 8] elements, three of them with a row scale; it may be null where there is
// neither scale nor mask, x is 16-byte aligned and its stride is a multiple of 8 and at least D.
sgf_cuda_plan sgf_cuda_covariance_plan(int64_t N, int64_t D, int sms);
int sgf_cuda_covariance(const void* x, int64_t stride, int64_t N, int64_t D, const float* row_scale,
                        const uint8_t* mask, void* planes, void* acc, int64_t stride_row, int64_t stride_column,
                        int acc_dtype, int dtype, sgf_cuda_plan plan, float* workspace, void* stream);

// norm_linear and residual_linear of slicegpt_fast/ops for many rows, on compute capability 9.0 with `sms`
// multiprocessors. h, weight, a, a2 and weight2 are 16-byte aligned and their strides multiples of 8 elements; nothing
// is asked of the others. sumsq of norm_linear may be null where no row is scaled; sgf_cuda_row_squares computes it.
// The workspace of residual_linear holds as many fp32 cells as the function for that says.
int sgf_cuda_row_squares(const void* h, int64_t stride_h, int M, int K, float* sumsq, int dtype, void* stream);
int sgf_cuda_norm_linear_prefill(const void* h, int64_t stride_h, const void* weight, int64_t stride_weight,
                                 const void* bias, const float* sumsq, void* y, int64_t stride_y, int M, int scaled,
                                 int unscaled, int K, float eps, float inverse_width, int activation, int dtype,
                                 int sms, void* stream);
int64_t sgf_cuda_residual_linear_prefill_workspace(int M, int n);
int sgf_cuda_residual_linear_prefill(const void* a, int64_t stride_a, const void* weight, int64_t stride_weight,
                                     const void* a2, int64_t stride_a2, const void* weight2, int64_t stride_weight2,
                                     int weight2_along_n, const void* bias, const void* residual,
                                     int64_t stride_residual, void* y, int64_t stride_y, float* sumsq, int M, int n,
                                     int K, int K2, int dtype, int sms, float* workspace, int64_t workspace_cells,
                                     void* stream);
#endif
#endif

#ifdef __cplusplus
}
#endif
