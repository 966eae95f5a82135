"""The native extension, compiled from csrc/ (functions bound in csrc/bindings.cpp)."""

def build_info() -> dict[str, str]: ...
def cpu_features() -> str: ...
def cpu_isa() -> str: ...
def cpu_isa_names() -> tuple[str, ...]: ...

# Addresses are tensor.data_ptr(), 0 for none; dtypes are numbers of csrc/slicegpt_fast.h.
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

# Only in a build with CUDA. `out`: device address of two int32; `stream`: a cudaStream_t.
def cuda_probe(out: int, threads: int, stream: int) -> None: ...
