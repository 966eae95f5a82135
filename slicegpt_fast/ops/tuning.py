"""Measuring tiles on this machine's GPU, for the user's tuning table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch

from slicegpt_fast.errors import InputError
from slicegpt_fast.ops.norm_linear import reference as norm_linear_reference
from slicegpt_fast.ops.residual_linear import reference as residual_linear_reference


class Shape(NamedTuple):
    """One matmul of a sliced block: [M, K] by [N, K]."""

    op: str  # "norm_linear" or "residual_linear"
    m: int
    n: int
    k: int


class Measured(NamedTuple):
    """What one shape came to, in microseconds: the best tile of the kernel, and torch."""

    shape: Shape
    kernel_us: float
    reference_us: float


def block_shapes(width: int, attention: int, key_value: int, intermediate: int, rows: Iterable[int]) -> list[Shape]:
    """The four matmuls of a gated decoder block with dense shortcuts.

    Args:
        width: d, the kept size of the residual stream.
        attention: heads * head_dim. key_value: key/value heads * head_dim. intermediate: width of the gated MLP.
        rows: values of M (tokens in a call) to measure.
    """
    return [
        shape
        for m in rows
        for shape in (
            Shape("norm_linear", m, attention + 2 * key_value, width),
            Shape("residual_linear", m, width, attention + width),
            Shape("norm_linear", m, 2 * intermediate, width),
            Shape("residual_linear", m, width, intermediate + width),
        )
    ]


def tune(shapes: Iterable[Shape], dtype: torch.dtype) -> Iterator[Measured]:
    """Measures every tile and torch on each shape and records the best tile in the user's table; yields each result.

    Raises:
        InputError: there is no CUDA device, or the kernels do not run on it in this dtype.
    """
    if not torch.cuda.is_available():
        raise InputError("there is no CUDA device to tune for; run tune on a machine with a GPU.")
    from triton.testing import do_bench

    from slicegpt_fast.triton_kernels import norm_linear as norm_kernels
    from slicegpt_fast.triton_kernels import residual_linear as residual_kernels
    from slicegpt_fast.triton_kernels.launch import gpu_of
    from slicegpt_fast.triton_kernels.tiles import bucket, record, tiles_for

    device = torch.device("cuda", torch.cuda.current_device())
    gpu = gpu_of(device)
    for shape in dict.fromkeys(shapes):
        op, m, n, k = shape
        a = torch.randn(m, k, dtype=dtype, device=device)
        weight = torch.randn(n, k, dtype=dtype, device=device)
        kernel: Callable[..., Any]
        reference: Callable[..., Any]
        arguments: tuple[Any, ...]
        if op == "norm_linear":
            kernel, reference, epilogue = norm_kernels.norm_linear, norm_linear_reference, None
            arguments = (a, weight, None, 1e-5, k, torch.rand(m, device=device) + 1, None, 0)
        else:
            kernel, reference, epilogue = residual_kernels.residual_linear, residual_linear_reference, "dense"
            arguments = (a[:, n:], weight[:, n:], None, None, a[:, :n], weight[:, :n].T.contiguous())
        reference_us = 1e3 * do_bench(partial(reference, *arguments), return_mode="median")
        times = {
            tile: 1e3 * do_bench(partial(kernel, *arguments, tile=tile), return_mode="median")
            for tile in tiles_for(gpu, dtype, m, True, epilogue)
        }
        tile, kernel_us = min(times.items(), key=lambda item: item[1])
        record(gpu, op, bucket(dtype, m, n, k), tile, kernel_us, reference_us)
        yield Measured(shape, kernel_us, reference_us)
