"""The ``cuda`` backend: from tensors to the kernels of csrc/cuda.

They are ``norm_linear`` and ``residual_linear``, for more than 16 rows on Hopper alone, ``attend``, and ``covariance_``
on Hopper.
``auto`` chooses them where `slicegpt-fast tune` has measured them to be the fastest.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, overload

import torch
from torch import Tensor

from slicegpt_fast import _C
from slicegpt_fast.kernels.counters import counters
from slicegpt_fast.kernels.native import ACTIVATIONS, DTYPES, build_info
from slicegpt_fast.kernels.operands import cache, has_rows, heads, rows, rows_or_columns, tokens, vector
from slicegpt_fast.kernels.regimes import DECODE_ROWS
from slicegpt_fast.ops.attend import OP as ATTEND
from slicegpt_fast.ops.attend import reference as attend_reference
from slicegpt_fast.ops.covariance import OP as COVARIANCE
from slicegpt_fast.ops.dispatch import HALF, Request
from slicegpt_fast.ops.norm_linear import OP as NORM_LINEAR
from slicegpt_fast.ops.residual_linear import OP as RESIDUAL_LINEAR

LONGEST_HEAD = 256  # numbers of a head that attend's kernel takes
PREPARED_TOKENS = 16384  # bounds the copies of x that a row scale, a mask or a misaligned x calls for


def refuses(request: Request) -> str | None:
    """Why no kernel can run ``request``, whatever the op, or None."""
    if build_info().cuda_compiler is None:
        return "slicegpt-fast was built without CUDA"
    if request.device.type != "cuda":
        return f"it runs on CUDA devices, not on {request.device.type}"
    if request.capability < (8, 0):
        return "it needs compute capability 8.0 or newer"
    if request.dtype not in HALF:
        return f"it has no {request.dtype} kernel"
    return None if request.weight == "full" else f"it has no kernel for weights in {request.weight}"


def hopper_refuses(request: Request) -> str | None:
    """Why a kernel for Hopper alone cannot run ``request``, or None."""
    if refusal := refuses(request):
        return refusal
    if request.capability != (9, 0):
        return "it has a kernel for compute capability 9.0 only"
    return None if "90a" in build_info().cuda_archs else "slicegpt-fast was built without the architecture 90a"


def linear_refuses(request: Request) -> str | None:
    """Why the kernels of the linear ops cannot run ``request``, or None: more than 16 rows are for Hopper."""
    return refuses(request) if request.regime == "decode" else hopper_refuses(request)


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Makes ``device`` the current one, where it is not."""
    return nullcontext() if device.index == torch.cuda.current_device() else torch.cuda.device(device)


@lru_cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def covariance_(acc: Tensor, x: Tensor, row_scale: Tensor | None, mask: Tensor | None) -> None:
    """The op, on Hopper, for an x with elements."""
    x, D = rows(x), x.shape[1]
    row_scale = None if row_scale is None else row_scale.float().contiguous()
    mask = vector(mask)
    readable = x.stride(0) >= D and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0
    prepare = not readable or row_scale is not None or mask is not None
    step = PREPARED_TOKENS if prepare else x.shape[0]
    with on(x.device):
        stream = torch.cuda.current_stream().cuda_stream
        for first in range(0, x.shape[0], step):
            part = slice(first, first + step)
            N = x[part].shape[0]
            planes = x.new_empty(N if row_scale is None else 3 * N, -(-D // 8) * 8) if prepare else None
            splits, cells, _ = _C.cuda_covariance_plan(N, D, multiprocessors(x.device))
            workspace = torch.empty(cells, dtype=torch.float32, device=x.device)
            _C.cuda_covariance(
                acc, x[part], None if row_scale is None else row_scale[part], None if mask is None else mask[part],
                DTYPES[acc.dtype], DTYPES[x.dtype], splits, planes, workspace, stream,
            )  # fmt: skip


@overload
def copyable(x: Tensor) -> Tensor: ...
@overload
def copyable(x: Tensor | None) -> Tensor | None: ...
def copyable(x: Tensor | None) -> Tensor | None:
    """``x`` where its rows start on 16 bytes, as the copy engine needs them, else a copy in rows padded to that."""
    if x is None or (x.data_ptr() % 16 == 0 and x.stride(0) % 8 == 0 and x.stride(0) >= x.shape[1]):
        return x
    M, width = x.shape
    return x.new_empty(M, -(-width // 8) * 8)[:, :width].copy_(x)


def norm_linear(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    full_width: int,
    sumsq: Tensor | None,
    activation: str | None,
    unscaled: int,
    scales: None = None,
) -> Tensor:
    """The op, for an h and a weight with elements."""
    h, weight = rows(h), rows(weight)
    bias, sumsq = vector(bias), vector(sumsq)
    (M, K), scaled = h.shape, weight.shape[0] - unscaled
    y = h.new_empty(M, (scaled // 2 if activation == "silu_gate" else scaled) + unscaled)
    code, dtype = ACTIVATIONS[activation], DTYPES[h.dtype]
    if M > DECODE_ROWS:
        h, weight, sms = copyable(h), copyable(weight), multiprocessors(h.device)
        width = _C.cuda_norm_linear_prefill_width(M, scaled, unscaled, K, code, sms)
        with on(h.device):
            stream = torch.cuda.current_stream().cuda_stream
            if sumsq is None and scaled:
                sumsq = torch.empty(M, dtype=torch.float32, device=h.device)
                _C.cuda_row_squares(h, sumsq, dtype, stream)
            _C.cuda_norm_linear_prefill(
                h, weight, bias, sumsq, y, unscaled, eps, full_width, code, dtype, width, sms, stream
            )
        return y
    splits, cells, counts = _C.cuda_norm_linear_plan(M, scaled, unscaled, K, code, multiprocessors(h.device))
    workspace = torch.empty(cells, dtype=torch.float32, device=h.device)
    with on(h.device):
        _C.cuda_norm_linear(
            h, weight, bias, sumsq, y, unscaled, eps, full_width, code, dtype,
            splits, workspace, counters(counts, h.device), torch.cuda.current_stream().cuda_stream,
        )  # fmt: skip
    return y


def residual_linear(
    a: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    a2: Tensor | None,
    weight2: Tensor | None,
    scales: None = None,
) -> tuple[Tensor, Tensor]:
    """The op, for an a and a weight with elements."""
    a, weight, residual, bias = rows(a), rows(weight), rows(residual), vector(bias)
    (M, K), n = a.shape, weight.shape[0]
    if a2 is None or weight2 is None or a2.shape[1] == 0:
        a2 = weight2 = None
    else:
        a2, weight2 = rows(a2), rows_or_columns(weight2)
    K2 = 0 if a2 is None else a2.shape[1]
    y, dtype = a.new_empty(M, n), DTYPES[a.dtype]
    sumsq = torch.empty(M, dtype=torch.float32, device=a.device)
    if M > DECODE_ROWS:
        a, weight, a2 = copyable(a), copyable(weight), copyable(a2)
        if weight2 is not None:  # or the transposed view of a linear layer's weight
            weight2 = copyable(weight2) if has_rows(weight2) else copyable(weight2.T).T
        sms = multiprocessors(a.device)
        width, splits, cells = _C.cuda_residual_linear_prefill_plan(M, n, K, K2, sms)
        workspace = torch.empty(cells, dtype=torch.float32, device=a.device)
        with on(a.device):
            _C.cuda_residual_linear_prefill(
                a, weight, bias, residual, a2, weight2, y, sumsq, dtype,
                width, splits, sms, workspace, torch.cuda.current_stream().cuda_stream,
            )  # fmt: skip
        return y, sumsq
    splits, cells, counts = _C.cuda_residual_linear_plan(M, n, K, K2, multiprocessors(a.device))
    workspace = torch.empty(cells, dtype=torch.float32, device=a.device)
    with on(a.device):
        _C.cuda_residual_linear(
            a, weight, bias, residual, a2, weight2, y, sumsq, dtype,
            splits, workspace, counters(counts, a.device), torch.cuda.current_stream().cuda_stream,
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
    """The op, for tensors with elements; longer heads than the kernel takes go to the reference."""
    (B, T, H, D), (_, G, C, _), r = queries.shape, keys.shape, new_values.shape[3]
    if D > LONGEST_HEAD:
        return attend_reference(
            queries, new_keys, new_values, cosine, sine, keys, values, start, scale, mask, query_norm, key_norm, eps
        )
    y = queries.new_empty(B * T, H * r)
    splits, cells, counts = _C.cuda_attend_plan(B, T, H, G, C, multiprocessors(y.device))
    workspace = torch.empty(cells, dtype=torch.float32, device=y.device)
    with on(y.device):
        _C.cuda_attend(
            heads(queries), heads(new_keys), heads(new_values), tokens(cosine), tokens(sine), vector(query_norm),
            vector(key_norm), cache(keys), cache(values), tokens(mask), start.view(1), y, B, D, r, eps, scale,
            DTYPES[y.dtype], splits, workspace, counters(counts, y.device), torch.cuda.current_stream().cuda_stream,
        )  # fmt: skip
    return y


ATTEND.add_backend("cuda", attend, refuses)
COVARIANCE.add_backend("cuda", covariance_, hopper_refuses)
NORM_LINEAR.add_backend("cuda", norm_linear, linear_refuses)
RESIDUAL_LINEAR.add_backend("cuda", residual_linear, linear_refuses)
