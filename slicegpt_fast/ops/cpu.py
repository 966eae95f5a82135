"""The CPU backend: from tensors to the kernels of csrc/cpu/."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from slicegpt_fast import _C
from slicegpt_fast.ops.dispatch import Request

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # SGF_FLOAT32 ... in csrc/slicegpt_fast.h
MASTERS = {torch.float32: 0, torch.float64: 3}  # of covariance_
ACTIVATIONS = {None: 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "silu_gate": 4}  # SGF_NO_ACTIVATION ...
STREAMED_ROWS = {torch.float32: 64, torch.bfloat16: 32, torch.float16: math.inf}  # with more, torch's matmul is faster


def refuses(request: Request) -> str | None:
    """Why the CPU kernels cannot run ``request``, or None."""
    if request.device.type != "cpu":
        return f"it runs on CPUs, not on {request.device.type}"
    return None if request.dtype in DTYPES else f"it has no {request.dtype} kernel"


def covariance_(acc: Tensor, x: Tensor, row_scale: Tensor | None, mask: Tensor | None) -> None:
    rows = None if mask is None else mask.nonzero()
    N, D = x.shape[0] if rows is None else rows.shape[0], x.shape[1]
    if N == 0 or D == 0:
        return
    x, sums = _rows(x), _rows(acc)
    row_scale = None if row_scale is None else row_scale.to(torch.float32).contiguous()
    _C.covariance(
        sums.data_ptr(), MASTERS[sums.dtype], sums.stride(0), x.data_ptr(), DTYPES[x.dtype], x.stride(0),
        _at(rows), _at(row_scale), N, D, torch.get_num_threads(),
    )  # fmt: skip
    if sums is not acc:
        acc.copy_(sums)


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
    product = h @ weight.T if STREAMED_ROWS[h.dtype] < M else None
    if activation == "silu_gate":
        y = torch.empty((M, (n + unscaled) // 2), dtype=h.dtype)
    else:
        y = torch.empty((M, n), dtype=h.dtype) if product is None else product
    h, weight = _rows(h), _rows_or_columns(weight)
    bias = None if bias is None else bias.contiguous()
    sumsq = None if sumsq is None else sumsq.contiguous()
    _C.norm_linear(
        DTYPES[h.dtype], M, n, K, *_rows_at(h), *_matrix_at(weight), *_rows_at(product), _at(bias), eps, full_width,
        _at(sumsq), ACTIVATIONS[activation], unscaled, y.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return y


def residual_linear(
    a: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, a2: Tensor | None, weight2: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Many rows: torch's matmuls onto the residual, then bias and squares in one pass."""
    M, K = a.shape
    n = weight.shape[0]
    sumsq = torch.empty(M)
    if STREAMED_ROWS[a.dtype] < M:
        y = a @ weight.T if residual is None else torch.addmm(residual, a, weight.T)
        if a2 is not None and weight2 is not None:
            y.addmm_(a2, weight2)
        K, residual, a2, weight2 = 0, y, None, None
    else:
        y = torch.empty((M, n), dtype=a.dtype)
    a, weight = _rows(a), _rows_or_columns(weight)
    bias = None if bias is None else bias.contiguous()
    residual = None if residual is None else _rows(residual)
    a2 = None if a2 is None else _rows(a2)
    weight2 = None if weight2 is None else _rows_or_columns(weight2)
    _C.residual_linear(
        DTYPES[a.dtype], M, n, K, *_rows_at(a), *_matrix_at(weight), _at(bias), *_rows_at(residual),
        0 if a2 is None else a2.shape[1], *_rows_at(a2), *_matrix_at(weight2), y.data_ptr(), sumsq.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return y, sumsq


def _rows(x: Tensor) -> Tensor:
    """``x``, or a copy of it, with each row in one piece."""
    return x if x.stride(1) == 1 else x.contiguous()


def _rows_or_columns(weight: Tensor) -> Tensor:
    """``weight``, or a copy of it, with each row or each column in one piece."""
    return weight if 1 in weight.stride() else weight.contiguous()


def _at(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _rows_at(x: Tensor | None) -> tuple[int, int]:
    """Address and row stride."""
    return (0, 0) if x is None else (x.data_ptr(), x.stride(0))


def _matrix_at(x: Tensor | None) -> tuple[int, int, int]:
    """Address and strides."""
    return (0, 0, 0) if x is None else (x.data_ptr(), x.stride(0), x.stride(1))
