"""The native extension, compiled from csrc/ (functions bound in csrc/bindings.cpp)."""

def build_info() -> dict[str, str]: ...
def cpu_features() -> str: ...
def cpu_isa() -> str: ...
def cpu_isa_names() -> tuple[str, ...]: ...

# Addresses are tensor.data_ptr(), 0 for none; dtypes and activations are numbers of csrc/slicegpt_fast.h.
def covariance(
    acc: int,
    acc_dtype: int,
    acc_stride: int,
    x: int,
    dtype: int,
    x_stride: int,
    rows: int,
    row_scale: int,
    N: int,
    D: int,
    threads: int,
    /,
) -> None: ...
def norm_linear(
    dtype: int,
    M: int,
    n: int,
    K: int,
    h: int,
    h_stride: int,
    weight: int,
    weight_row_stride: int,
    weight_column_stride: int,
    product: int,
    product_stride: int,
    bias: int,
    eps: float,
    full_width: float,
    sumsq: int,
    activation: int,
    unscaled: int,
    y: int,
    threads: int,
    /,
) -> None: ...
def residual_linear(
    dtype: int,
    M: int,
    n: int,
    K: int,
    a: int,
    a_stride: int,
    weight: int,
    weight_row_stride: int,
    weight_column_stride: int,
    bias: int,
    residual: int,
    residual_stride: int,
    K2: int,
    a2: int,
    a2_stride: int,
    weight2: int,
    weight2_row_stride: int,
    weight2_column_stride: int,
    y: int,
    sumsq: int,
    threads: int,
    /,
) -> None: ...

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
