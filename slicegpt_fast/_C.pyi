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
