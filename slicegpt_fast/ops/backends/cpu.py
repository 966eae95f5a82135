"""The CPU backend: from tensors to the kernels of csrc/cpu/."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from slicegpt_fast import _C
from slicegpt_fast.kernels.native import ACTIVATIONS, DTYPES
from slicegpt_fast.kernels.operands import address, matrix_at, rows, rows_at, vector
from slicegpt_fast.ops.covariance import OP as COVARIANCE
from slicegpt_fast.ops.dispatch import Request
from slicegpt_fast.ops.norm_linear import OP as NORM_LINEAR
from slicegpt_fast.ops.residual_linear import OP as RESIDUAL_LINEAR

STREAMED_ROWS = {torch.float32: 64, torch.bfloat16: 32, torch.float16: math.inf}  # with more, torch's matmul is faster


def refuses(request: Request) -> str | None:
    """Why the CPU kernels cannot run ``request``, or None."""
    if request.device.type != "cpu":
        return f"it runs on CPUs, not on {request.device.type}"
    return None if request.dtype in STREAMED_ROWS else f"it has no {request.dtype} kernel"


def covariance_(acc: Tensor, x: Tensor, row_scale: Tensor | None, mask: Tensor | None) -> None:
    tokens = None if mask is None else mask.nonzero()
    N, D = x.shape[0] if tokens is None else tokens.shape[0], x.shape[1]
    if N == 0 or D == 0:
        return
    x, sums = rows(x), rows(acc)
    row_scale = None if row_scale is None else row_scale.float().contiguous()
    _C.covariance(
        sums.data_ptr(), DTYPES[sums.dtype], sums.stride(0), x.data_ptr(), DTYPES[x.dtype], x.stride(0),
        address(tokens), address(row_scale), N, D, torch.get_num_threads(),
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
        y = h.new_empty(M, (n + unscaled) // 2)
    else:
        y = h.new_empty(M, n) if product is None else product
    h, weight = rows(h), _rows_or_columns(weight)
    bias, sumsq = vector(bias), vector(sumsq)
    _C.norm_linear(
        DTYPES[h.dtype], M, n, K, *rows_at(h), *matrix_at(weight), *rows_at(product), address(bias), eps, full_width,
        address(sumsq), ACTIVATIONS[activation], unscaled, y.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return y


def residual_linear(
    a: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, a2: Tensor | None, weight2: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Many rows: torch's matmuls onto the residual, then bias and squares in one pass."""
    M, K = a.shape
    n = weight.shape[0]
    sumsq = torch.empty(M, dtype=torch.float32, device=a.device)
    if STREAMED_ROWS[a.dtype] < M:
        y = a @ weight.T if residual is None else torch.addmm(residual, a, weight.T)
        if a2 is not None and weight2 is not None:
            y.addmm_(a2, weight2)
        K, residual, a2, weight2 = 0, y, None, None
    else:
        y = a.new_empty(M, n)
    a, weight = rows(a), _rows_or_columns(weight)
    residual, a2, bias = rows(residual), rows(a2), vector(bias)
    weight2 = None if weight2 is None else _rows_or_columns(weight2)
    _C.residual_linear(
        DTYPES[a.dtype], M, n, K, *rows_at(a), *matrix_at(weight), address(bias), *rows_at(residual),
        0 if a2 is None else a2.shape[1], *rows_at(a2), *matrix_at(weight2), y.data_ptr(), sumsq.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return y, sumsq


def _rows_or_columns(weight: Tensor) -> Tensor:
    """``weight``, or a copy of it, with each row or each column in one piece."""
    return weight if 1 in weight.stride() else weight.contiguous()


COVARIANCE.add_backend("cpu", covariance_, refuses)
NORM_LINEAR.add_backend("cpu", norm_linear, refuses)
RESIDUAL_LINEAR.add_backend("cpu", residual_linear, refuses)
