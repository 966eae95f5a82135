"""The ``triton`` backend: the kernels of triton_kernels/, on GPUs from compute capability 8.0 on."""

from __future__ import annotations

from importlib.util import find_spec

import torch

from slicegpt_fast.ops.dispatch import Request


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
    return None
