"""Measuring what serves each shape on this machine's GPU, for the user's tuning table (``kernels/measured.py``).

A kernel is timed only after its result was held against the reference: what is wrong on this GPU is never chosen.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from slicegpt_fast.errors import InputError
from slicegpt_fast.kernels import measured
from slicegpt_fast.ops.dispatch import OPS, Request, regime_of

TOLERANCE = 0.02  # of a result's norm: far above what 16-bit rounding does to it


class Shape(NamedTuple):
    """A call of an op: [m, k] by [n, k], or covariance_ of [m, n]."""

    op: str
    m: int
    n: int
    k: int
    epilogue: str | None = None  # as in Request


class Measured(NamedTuple):
    """What one shape came to: microseconds of each backend that can run it, the fastest first."""

    shape: Shape
    us: dict[str, float]


def block_shapes(
    width: int, attention: int, key_value: int, intermediate: int, rows: Iterable[int], rank: int = 64
) -> list[Shape]:
    """The matmuls of a gated decoder block, with each kind of shortcut.

    Args:
        width: d, the kept size of the residual stream.
        attention: heads * head_dim. key_value: key/value heads * head_dim. intermediate: width of the gated MLP.
        rows: values of M (tokens in a call) to measure.
        rank: of the low-rank shortcut.
    """
    readers = ((attention + 2 * key_value, None), (2 * intermediate, "silu_gate"))
    shortcuts = (("dense", width), ("low rank", rank), ("add", 0))
    return [
        shape
        for m in rows
        for shape in (
            *(Shape("norm_linear", m, n, width, activation) for n, activation in readers),
            *(Shape("residual_linear", m, width, k + k2, s) for k in (attention, intermediate) for s, k2 in shortcuts),
        )
    ]


def tune(shapes: Iterable[Shape], dtype: torch.dtype) -> Iterator[Measured]:
    """Measures every backend on each shape, Triton's with every tile, into the user's table; yields each result.

    A backend whose result differs from the reference's is warned of and counts as not measured.

    Raises:
        InputError: there is no CUDA device.
    """
    device = _device()
    from slicegpt_fast.triton_kernels.tiles import choose_tile

    for shape in dict.fromkeys(shapes):
        op, regime = OPS[shape.op], regime_of(shape.op, shape.m)
        request = Request(shape.op, device, dtype, regime, (shape.m, shape.n, shape.k), shape.epilogue)
        arguments = operands(request)
        expected = _results(op.backends["reference"].run, arguments)
        us, tile = {}, None
        for name, backend in op.backends.items():
            if op.refusal(name, request) is not None:
                continue
            times = {}
            for candidate, run in _candidates(name, request, backend.run):
                if _agrees(run, arguments, expected):
                    times[candidate] = microseconds(partial(run, arguments[0].clone(), *arguments[1:]))
                else:
                    what = f"{name} with {candidate}" if candidate else name
                    warnings.warn(f"{what} gives wrong results for {shape} and is left out: report it.", stacklevel=2)
            if times:
                best = min(times, key=times.__getitem__)
                us[name], tile = round(times[best], 2), best or tile
        entry = measured.Measured(us, None if tile is None else asdict(tile))
        measured.record(
            measured.gpu_name(device), shape.op, measured.bucket(dtype, request.shape, shape.epilogue), entry
        )
        op.forget()
        choose_tile.cache_clear()
        yield Measured(shape, dict(sorted(us.items(), key=lambda item: item[1])))


def operands(request: Request) -> tuple[Any, ...]:
    """Random arguments of the op that make it ask for ``request``, as the layers of a patched model would."""
    m, n, k = request.shape
    epilogue, device = request.epilogue, request.device

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(request.dtype)

    def weight(n: int, k: int) -> Tensor:
        """As a model's, so that no product overflows fp16."""
        return random(n, k) * k**-0.5

    if request.op == "covariance_":
        row_scale = torch.rand(m, dtype=torch.float32, device=device) + 0.5 if epilogue == "row scale" else None
        return torch.zeros(n, n, dtype=torch.float64, device=device), random(m, n), row_scale, None
    if request.op == "norm_linear":
        unscaled = n % 2  # a gate needs pairs of rows
        sumsq = torch.full((m,), float(k), dtype=torch.float32, device=device)
        return random(m, k), weight(n, k), None, 1e-5, k, sumsq, epilogue, unscaled
    # How K divides between the layer and the shortcut matters little.
    k2 = {"add": 0, "dense": n, "low rank": 64}[epilogue or "add"]
    k2 = k2 if k2 < k else k // 2
    residual = None if epilogue == "dense" else random(m, n)
    shortcut = (random(m, k2), weight(n, k2).T) if k2 else (None, None)
    return random(m, k - k2), weight(n, k - k2), None, residual, *shortcut


def microseconds(run: Callable[[], Any]) -> float:
    """The median time of ``run`` on the GPU, with a cold cache; infinite where the GPU cannot hold its tile."""
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    try:
        return 1e3 * do_bench(run, return_mode="median")
    except OutOfResources:
        return math.inf


def _results(run: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """What a call computes: its results, or the first argument that it changed in place."""
    first = arguments[0].clone()
    returned = run(first, *arguments[1:])
    return returned if isinstance(returned, tuple) else (first if returned is None else returned,)


def _agrees(run: Callable[..., Any], arguments: tuple[Any, ...], expected: tuple[Tensor, ...]) -> bool:
    """True where the results are the expected ones, or the GPU cannot hold the tile."""
    from triton.runtime.errors import OutOfResources

    try:
        results = _results(run, arguments)
    except OutOfResources:
        return True  # its time is infinite
    norms = ((torch.dist(a.double(), b.double()), b.double().norm()) for a, b in zip(results, expected, strict=True))
    return all(bool(distance <= TOLERANCE * norm) for distance, norm in norms)


def _candidates(backend: str, request: Request, run: Callable[..., Any]) -> Iterator[tuple[Any, Callable[..., Any]]]:
    """What there is to time of a backend: Triton's matmuls with each tile, anything else as it is."""
    if backend != "triton" or request.op == "covariance_":
        yield None, run
        return
    from slicegpt_fast.triton_kernels.launch import gpu_of
    from slicegpt_fast.triton_kernels.tiles import tiles_for

    m, *widths = request.shape
    aligned = all(width % 8 == 0 for width in (widths[1:] if request.op == "norm_linear" else widths))
    for tile in tiles_for(gpu_of(request.device), request.dtype, m, aligned, request.epilogue):
        yield tile, lambda *arguments, tile=tile: run(*arguments, tile)


def _device() -> torch.device:
    if not torch.cuda.is_available():
        raise InputError("there is no CUDA device to tune for; run tune on a machine with a GPU.")
    return torch.device("cuda", torch.cuda.current_device())
