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

#ifdef SGF_CUDA
// Writes {blockDim.x, __CUDA_ARCH__ of the code that ran} to out[0..1] (device memory) from a launch with `threads`
// threads: shows which of the compiled architectures a GPU picks.
int sgf_cuda_probe(int32_t* out, int threads, void* stream);

const char* sgf_cuda_status_text(int status);

// What a launch needs from its caller: `workspace` fp32 cells, and `counters` int32 cells that hold zero, which is what
// they hold again when the kernel has ended. `splits` is how many blocks share a tile.
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
#endif
#endif

#ifdef __cplusplus
}
#endif
