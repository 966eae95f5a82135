"""The CPU backend: from tensors to the kernels of csrc/cpu/."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from slicegpt_fast import _C
from slicegpt_fast.kernels.native import ACTIVATIONS, DTYPES, WEIGHT_DTYPES
from slicegpt_fast.kernels.operands import cache, heads, rows, rows_or_columns, tokens, vector
from slicegpt_fast.ops.attend import OP as ATTEND
from slicegpt_fast.ops.covariance import OP as COVARIANCE
from slicegpt_fast.ops.dispatch import Request
from slicegpt_fast.ops.norm_linear import OP as NORM_LINEAR
from slicegpt_fast.ops.residual_linear import OP as RESIDUAL_LINEAR

DEQUANTIZED_ROWS = 64  # with more, a weight is dequantised once for all of them
STREAMED_ROWS = {torch.float32: 64, torch.bfloat16: 32, torch.float16: math.inf}  # with more, torch's matmul is faster


def refuses(request: Request) -> str | None:
    """Why the CPU kernels cannot run ``request``, or None."""
    if request.device.type != "cpu":
        return f"it runs on CPUs, not on {request.device.type}"
    return None if request.dtype in STREAMED_ROWS else f"it has no {request.dtype} kernel"


def covariance_(acc: Tensor, x: Tensor, row_scale: Tensor | None, mask: Tensor | None) -> None:
    selected = None if mask is None else mask.nonzero().flatten()
    if x.numel() == 0 or (selected is not None and selected.numel() == 0):
        return
    x, sums = rows(x), rows(acc)
    row_scale = None if row_scale is None else row_scale.float().contiguous()
    _C.covariance(sums, x, row_scale, selected, DTYPES[sums.dtype], DTYPES[x.dtype], torch.get_num_threads())
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
    scales: Tensor | None = None,
) -> Tensor:
    """Many rows: torch's matmul, then scale, bias and activation in one pass."""
    if scales is not None and h.shape[0] > DEQUANTIZED_ROWS:
        weight, scales = _dequantized(weight, scales, h), None
    M, n = h.shape[0], weight.shape[0]
    product = h @ weight.T if scales is None and _by_torch(h, h.shape[1]) else None
    if activation == "silu_gate":
        y = h.new_empty(M, (n + unscaled) // 2)
    else:
        y = h.new_empty(M, n) if product is None else product
    _C.norm_linear(
        rows(h), _as_read(weight, scales), rows(scales), vector(bias), vector(sumsq), product, y, unscaled, eps,
        full_width, ACTIVATIONS[activation], WEIGHT_DTYPES[weight.dtype], DTYPES[h.dtype], torch.get_num_threads(),
    )  # fmt: skip
    return y


def residual_linear(
    a: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    a2: Tensor | None,
    weight2: Tensor | None,
    scales: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Many rows: torch's matmuls onto the residual, then bias and squares in one pass."""
    if scales is not None and a.shape[0] > DEQUANTIZED_ROWS:
        weight, scales = _dequantized(weight, scales, a), None
    M, dtype = a.shape[0], DTYPES[a.dtype]
    sumsq = torch.empty(M, dtype=torch.float32, device=a.device)
    if scales is None and _by_torch(a, a.shape[1], 0 if a2 is None else a2.shape[1]):
        y = a @ weight.T if residual is None else torch.addmm(residual, a, weight.T)
        if a2 is not None and weight2 is not None:
            y.addmm_(a2, weight2)
        _C.residual_linear(
            None, None, None, vector(bias), y, None, None, y, sumsq, dtype, dtype, torch.get_num_threads()
        )
    else:
        y = a.new_empty(M, weight.shape[0])
        _C.residual_linear(
            rows(a), _as_read(weight, scales), rows(scales), vector(bias), rows(residual), rows(a2),
            rows_or_columns(weight2), y, sumsq, WEIGHT_DTYPES[weight.dtype], dtype, torch.get_num_threads(),
        )  # fmt: skip
    return y, sumsq


def attend(
    queries: Tensor,
    new_keys: Tensor,
    new_values: Tensor,
    cosine: Tensor | None,
    sine: Tensor | None,
    keys: Tensor,
    values: Tensor,
    start: Tensor,
    scale: float,
    mask: Tensor | None,
    query_norm: Tensor | None,
    key_norm: Tensor | None,
    eps: float,
) -> Tensor:
    (B, T, H, D), r = queries.shape, new_values.shape[3]
    y = queries.new_empty(B * T, H * r)
    _C.attend(
        heads(queries), heads(new_keys), heads(new_values), tokens(cosine), tokens(sine), vector(query_norm),
        vector(key_norm), cache(keys), cache(values), tokens(mask), y, B, D, r, int(start), eps, scale,
        DTYPES[queries.dtype], torch.get_num_threads(),
    )  # fmt: skip
    return y


def _as_read(weight: Tensor, scales: Tensor | None) -> Tensor:
    """A weight as the kernels read it."""
    return rows_or_columns(weight) if scales is None else rows(weight)


def _dequantized(weight: Tensor, scales: Tensor, x: Tensor) -> Tensor:
    """The weight [n, k] that integers and scales stand for, in the dtype of ``x`` [M, k]."""
    full = x.new_empty(weight.shape[0], x.shape[1])
    _C.dequantize(
        rows(weight), rows(scales), full, WEIGHT_DTYPES[weight.dtype], DTYPES[x.dtype], torch.get_num_threads()
    )
    return full


def _by_torch(x: Tensor, *widths: int) -> bool:
    """Whether torch multiplies the rows of ``x``, by matrices whose inner widths are these.

    In bf16 it reads an odd width's last number with the one behind it, times zero: NaN where that one is no number
    (oneDNN on AMX, torch 2.13).
    """
    padded = x.dtype == torch.bfloat16 and any(width % 2 for width in widths)
    return STREAMED_ROWS[x.dtype] < x.shape[0] and not padded


ATTEND.add_backend("cpu", attend, refuses)
COVARIANCE.add_backend("cpu", covariance_, refuses)
NORM_LINEAR.add_backend("cpu", norm_linear, refuses)
RESIDUAL_LINEAR.add_backend("cpu", residual_linear, refuses)
