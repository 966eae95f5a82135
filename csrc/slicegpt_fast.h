// The native core of slicegpt-fast: a flat C interface that knows neither torch nor Python.
//
// Conventions, for every function here:
//   * pointers, sizes and strides come from the caller, who owns all memory; sizes and strides are 64-bit, strides
//   count
//     elements;
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
#endif

#ifdef __cplusplus
}
#endif
