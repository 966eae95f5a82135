"""The CPU backend: from tensors to the kernels of csrc/cpu/."""

from __future__ import annotations

import torch
from torch import Tensor

from slicegpt_fast import _C
from slicegpt_fast.ops.dispatch import Request

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # SGF_FLOAT32 ... in csrc/slicegpt_fast.h
MASTERS = {torch.float32: 0, torch.float64: 3}  # of covariance_


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
        _address(rows), _address(row_scale), N, D, torch.get_num_threads(),
    )  # fmt: skip
    if sums is not acc:
        acc.copy_(sums)


def _rows(x: Tensor) -> Tensor:
    """``x``, or a copy of it, with each row in one piece."""
    return x if x.stride(1) == 1 else x.contiguous()


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()
