"""The ``triton`` backend: the kernels of triton_kernels/, on GPUs from compute capability 8.0 on."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from slicegpt_fast.ops.attend import OP as ATTEND
from slicegpt_fast.ops.covariance import OP as COVARIANCE
from slicegpt_fast.ops.dispatch import Request
from slicegpt_fast.ops.norm_linear import OP as NORM_LINEAR
from slicegpt_fast.ops.residual_linear import OP as RESIDUAL_LINEAR

if TYPE_CHECKING:
    from slicegpt_fast.triton_kernels.tiles import Tile


def refuses(request: Request) -> str | None:
    """Why the Triton kernels cannot run ``request``, or None."""
    if find_spec("triton") is None:
        return "Triton is not installed"
    from slicegpt_fast.triton_kernels.launch import KERNEL_DTYPES, interpreting

    if request.device.type != "cuda" and not interpreting():
        return f"it runs on CUDA devices, not on {request.device.type}"
    if request.device.type == "cuda" and request.capability < (8, 0):
        return "it needs compute capability 8.0 or newer"
    if request.dtype not in KERNEL_DTYPES:
        return f"it has no {request.dtype} kernel"
    if request.dtype == torch.float32 and request.capability >= (10, 0):
        return "on this GPU Triton rounds fp32 operands to tf32"
    return None if request.weight == "full" else f"it has no kernel for weights in {request.weight}"


def tiles(request: Request, *widths: int) -> tuple[Tile, ...]:
    """Return every tile that a matmul may use; rows load in vectors where all of ``widths`` divide into them."""
    from slicegpt_fast.triton_kernels.launch import gpu_of
    from slicegpt_fast.triton_kernels.tiles import tiles_for

    aligned = all(width % 8 == 0 for width in widths)
    return tiles_for(gpu_of(request.device), request.dtype, request.shape[0], aligned, request.epilogue)


# Triton is imported with the first call of a kernel: it may be missing.


def attend(*arguments: Any) -> Tensor:
    from slicegpt_fast.triton_kernels.attend import attend

    return attend(*arguments)


def covariance_(*arguments: Any) -> None:
    from slicegpt_fast.triton_kernels.covariance import covariance_

    covariance_(*arguments)


def norm_linear(*arguments: Any) -> Tensor:
    from slicegpt_fast.triton_kernels.norm_linear import norm_linear

    return norm_linear(*arguments)


def residual_linear(*arguments: Any) -> tuple[Tensor, Tensor]:
    from slicegpt_fast.triton_kernels.residual_linear import residual_linear

    return residual_linear(*arguments)


ATTEND.add_backend("triton", attend, refuses)
COVARIANCE.add_backend("triton", covariance_, refuses)
NORM_LINEAR.add_backend("triton", norm_linear, refuses, lambda request: tiles(request, request.shape[2]))
RESIDUAL_LINEAR.add_backend("triton", residual_linear, refuses, lambda request: tiles(request, *request.shape[1:]))
