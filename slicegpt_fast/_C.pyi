"""The native extension, compiled from csrc/ (functions bound in csrc/bindings.cpp)."""

def build_info() -> dict[str, str]: ...
def cpu_features() -> str: ...
def cpu_isa() -> str: ...
def cpu_isa_names() -> tuple[str, ...]: ...

# Only in a build with CUDA. `out`: device address of two int32; `stream`: a cudaStream_t.
def cuda_probe(out: int, threads: int, stream: int) -> None: ...

# Plans are (splits, fp32 cells of workspace, zeroed int32 counters). Tensors are device addresses, 0 where absent.
CudaPlan = tuple[int, int, int]

def cuda_norm_linear_plan(M: int, scaled: int, unscaled: int, K: int, activation: int, sms: int) -> CudaPlan: ...
def cuda_norm_linear(
    h: int,
    stride_h: int,
    weight: int,
    stride_weight: int,
    bias: int,
    sumsq: int,
    y: int,
    stride_y: int,
    M: int,
    scaled: int,
    unscaled: int,
    K: int,
    eps: float,
    inverse_width: float,
    activation: int,
    dtype: int,
    plan: CudaPlan,
    workspace: int,
    counters: int,
    stream: int,
) -> None: ...
def cuda_residual_linear_plan(M: int, n: int, K: int, K2: int, sms: int) -> CudaPlan: ...
def cuda_residual_linear(
    a: int,
    stride_a: int,
    weight: int,
    stride_weight: int,
    a2: int,
    stride_a2: int,
    weight2: int,
    stride_weight2: int,
    weight2_along_n: bool,
    bias: int,
    residual: int,
    stride_residual: int,
    y: int,
    stride_y: int,
    sumsq: int,
    M: int,
    n: int,
    K: int,
    K2: int,
    dtype: int,
    plan: CudaPlan,
    workspace: int,
    counters: int,
    stream: int,
) -> None: ...

# Only in a build for 90a.
def cuda_covariance_plan(N: int, D: int, sms: int) -> CudaPlan: ...
def cuda_covariance(
    x: int,
    stride: int,
    N: int,
    D: int,
    row_scale: int,
    mask: int,
    planes: int,
    acc: int,
    stride_row: int,
    stride_column: int,
    acc_dtype: int,
    dtype: int,
    plan: CudaPlan,
    workspace: int,
    stream: int,
) -> None: ...
