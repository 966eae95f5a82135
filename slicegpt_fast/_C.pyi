"""The native extension, compiled from csrc/ (bound in csrc/bindings.cpp and csrc/cuda/bindings.cpp)."""

from torch import Tensor

def build_info() -> dict[str, str]: ...
def cpu_features() -> str: ...
def cpu_isa() -> str: ...
def cpu_isa_names() -> tuple[str, ...]: ...

# Operands are matrices or vectors; csrc/slicegpt_fast.h says how they are laid out and which of them may be absent.
# Dtypes and activations are its numbers.
def covariance(
    acc: Tensor,
    x: Tensor,
    row_scale: Tensor | None,
    selected: Tensor | None,
    acc_dtype: int,
    dtype: int,
    threads: int,
    /,
) -> None: ...
def norm_linear(
    h: Tensor,
    weight: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    sumsq: Tensor | None,
    product: Tensor | None,
    y: Tensor,
    unscaled: int,
    eps: float,
    full_width: float,
    activation: int,
    weight_dtype: int,
    dtype: int,
    threads: int,
    /,
) -> None: ...
def residual_linear(
    a: Tensor | None,
    weight: Tensor | None,
    scales: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    a2: Tensor | None,
    weight2: Tensor | None,
    y: Tensor,
    sumsq: Tensor,
    weight_dtype: int,
    dtype: int,
    threads: int,
    /,
) -> None: ...
def dequantize(weight: Tensor, scales: Tensor, y: Tensor, weight_dtype: int, dtype: int, threads: int, /) -> None: ...
def attend(
    queries: Tensor,
    new_keys: Tensor,
    new_values: Tensor,
    cosine: Tensor | None,
    sine: Tensor | None,
    query_norm: Tensor | None,
    key_norm: Tensor | None,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    y: Tensor,
    batch: int,
    size: int,
    rank: int,
    start: int,
    eps: float,
    scale: float,
    dtype: int,
    threads: int,
    /,
) -> None: ...

class Program:
    """A decode program: the ops of a run of decoder layers, run as one."""

    def norm_linear(
        self,
        h: Tensor,
        weight: Tensor,
        scales: Tensor | None,
        norm_weight: Tensor | None,
        bias: Tensor | None,
        y: Tensor,
        unscaled: int,
        eps: float,
        full_width: float,
        activation: int,
        weight_dtype: int,
        dtype: int,
        /,
    ) -> None: ...
    def residual_linear(
        self,
        a: Tensor,
        weight: Tensor,
        scales: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        a2: Tensor | None,
        weight2: Tensor | None,
        y: Tensor,
        weight_dtype: int,
        dtype: int,
        /,
    ) -> None: ...
    def attend(
        self,
        queries: Tensor,
        new_keys: Tensor,
        new_values: Tensor,
        query_norm: Tensor | None,
        key_norm: Tensor | None,
        y: Tensor,
        size: int,
        rank: int,
        eps: float,
        scale: float,
        dtype: int,
        /,
    ) -> None: ...
    def cache(self, layer: int, keys: Tensor, values: Tensor, /) -> None: ...
    def run(
        self,
        batch: int,
        tokens: int,
        first: int,
        start: int,
        cosine: Tensor | None,
        sine: Tensor | None,
        mask: Tensor | None,
        threads: int,
        /,
    ) -> None: ...

# Only in a build with CUDA. `out`: two int32 on the device; `stream`: a cudaStream_t.
def cuda_probe(out: Tensor | None, threads: int, stream: int, /) -> None: ...

# Plans are (splits, fp32 cells of workspace, zeroed int32 counters).
CudaPlan = tuple[int, int, int]

def cuda_norm_linear_plan(M: int, scaled: int, unscaled: int, K: int, activation: int, sms: int, /) -> CudaPlan: ...
def cuda_norm_linear(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    sumsq: Tensor | None,
    y: Tensor,
    unscaled: int,
    eps: float,
    full_width: float,
    activation: int,
    dtype: int,
    splits: int,
    workspace: Tensor | None,
    counters: Tensor | None,
    stream: int,
    /,
) -> None: ...
def cuda_residual_linear_plan(M: int, n: int, K: int, K2: int, sms: int, /) -> CudaPlan: ...
def cuda_residual_linear(
    a: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    a2: Tensor | None,
    weight2: Tensor | None,
    y: Tensor,
    sumsq: Tensor,
    dtype: int,
    splits: int,
    workspace: Tensor | None,
    counters: Tensor | None,
    stream: int,
    /,
) -> None: ...
def cuda_attend_plan(batch: int, tokens: int, heads: int, groups: int, positions: int, sms: int, /) -> CudaPlan: ...
def cuda_attend(
    queries: Tensor,
    new_keys: Tensor,
    new_values: Tensor,
    cosine: Tensor | None,
    sine: Tensor | None,
    query_norm: Tensor | None,
    key_norm: Tensor | None,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    start: Tensor,
    y: Tensor,
    batch: int,
    size: int,
    rank: int,
    eps: float,
    scale: float,
    dtype: int,
    splits: int,
    workspace: Tensor | None,
    counters: Tensor | None,
    stream: int,
    /,
) -> None: ...

# Only in a build for 90a.
def cuda_covariance_plan(N: int, D: int, sms: int, /) -> CudaPlan: ...
def cuda_covariance(
    acc: Tensor,
    x: Tensor,
    row_scale: Tensor | None,
    mask: Tensor | None,
    acc_dtype: int,
    dtype: int,
    splits: int,
    planes: Tensor | None,
    workspace: Tensor | None,
    stream: int,
    /,
) -> None: ...
def cuda_row_squares(h: Tensor, sumsq: Tensor, dtype: int, stream: int, /) -> None: ...
def cuda_norm_linear_prefill_width(M: int, scaled: int, unscaled: int, K: int, activation: int, sms: int, /) -> int: ...
def cuda_norm_linear_prefill(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    sumsq: Tensor | None,
    y: Tensor,
    unscaled: int,
    eps: float,
    full_width: float,
    activation: int,
    dtype: int,
    width: int,
    sms: int,
    stream: int,
    /,
) -> None: ...
def cuda_residual_linear_prefill_plan(M: int, n: int, K: int, K2: int, sms: int, /) -> CudaPlan: ...
def cuda_residual_linear_prefill(
    a: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    a2: Tensor | None,
    weight2: Tensor | None,
    y: Tensor,
    sumsq: Tensor,
    dtype: int,
    width: int,
    splits: int,
    sms: int,
    workspace: Tensor | None,
    stream: int,
    /,
) -> None: ...
