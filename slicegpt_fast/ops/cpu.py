"""The CPU backend: from tensors to the kernels of csrc/cpu/."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from slicegpt_fast import _C
from slicegpt_fast.ops.dispatch import Request

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # SGF_FLOAT32 ... in csrc/slicegpt_fast.h
ACTIVATIONS = {None: 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "silu_gate": 4}  # SGF_NO_ACTIVATION ...
STREAMED_ROWS = {torch.float32: 32, torch.bfloat16: 16, torch.float16: math.inf}  # with more, torch's matmul is faster


def refuses(request: Request) -> str | None:
    """Why the CPU kernels cannot run ``request``, or None."""
    if request.device.type != "cpu":
        return f"it runs on CPUs, not on {request.device.type}"
    return None if request.dtype in DTYPES else f"it has no {request.dtype} kernel"


def norm_linear(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    full_width: int,
    sumsq: Tensor | None,
    activation: str | None,
    unscaled: int,
) -> Tensor:
    """Many rows: torch's matmul, then scale, bias and activation in one pass."""
    M, K = h.shape
    n = weight.shape[0]
    y = torch.empty((M, (n + unscaled) // 2 if activation == "silu_gate" else n), dtype=h.dtype)
    h = _rows(h)
    if STREAMED_ROWS[h.dtype] < M:
        product = h @ weight.T
        weight_at, product_at = (0, 0, 0), (product.data_ptr(), n)
    else:
        weight = _rows_or_columns(weight)
        weight_at, product_at = (weight.data_ptr(), *weight.stride()), (0, 0)
    bias = None if bias is None else bias.contiguous()
    sumsq = None if sumsq is None else sumsq.contiguous()
    _C.norm_linear(
        DTYPES[h.dtype], M, n, K, h.data_ptr(), h.stride(0), *weight_at, *product_at, _address(bias),
        eps, full_width, _address(sumsq), ACTIVATIONS[activation], unscaled, y.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return y


def residual_linear(
    a: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, a2: Tensor | None, weight2: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Many rows: torch's matmuls, onto the residual, then bias and squares in one pass."""
    M, K = a.shape
    n = weight.shape[0]
    y = torch.empty((M, n), dtype=a.dtype)
    sumsq = torch.empty(M)
    if STREAMED_ROWS[a.dtype] < M:
        product = a @ weight.T if residual is None else torch.addmm(residual, a, weight.T)
        residual = product if a2 is None else product.addmm_(a2, weight2)
        K, a2 = 0, None
    a, weight = _rows(a), _rows_or_columns(weight)
    bias = None if bias is None else bias.contiguous()
    residual_at = (0, 0)
    if residual is not None:
        residual = _rows(residual)
        residual_at = residual.data_ptr(), residual.stride(0)
    K2, a2_at, weight2_at = 0, (0, 0), (0, 0, 0)
    if a2 is not None and weight2 is not None:
        a2, weight2 = _rows(a2), _rows_or_columns(weight2)
        K2, a2_at, weight2_at = a2.shape[1], (a2.data_ptr(), a2.stride(0)), (weight2.data_ptr(), *weight2.stride())
    _C.residual_linear(
        DTYPES[a.dtype], M, n, K, a.data_ptr(), a.stride(0), weight.data_ptr(), *weight.stride(), _address(bias),
        *residual_at, K2, *a2_at, *weight2_at, y.data_ptr(), sumsq.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return y, sumsq


def _rows(x: Tensor) -> Tensor:
    """``x``, or a copy of it, with each row in one piece."""
    return x if x.stride(1) == 1 else x.contiguous()


def _rows_or_columns(weight: Tensor) -> Tensor:
    """``weight``, or a copy of it, with each row or each column in one piece."""
    return weight if 1 in weight.stride() else weight.contiguous()


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()
