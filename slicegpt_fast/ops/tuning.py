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
from slicegpt_fast.kernels.regimes import Epilogue
from slicegpt_fast.ops.dispatch import OPS, Request

# Of the norm of each row and column, or of an average one where that is larger: far above what 16-bit rounding does.
TOLERANCE = 0.02


class Shape(NamedTuple):
    """A call of an op: [m, k] by [n, k], or covariance_ of [m, n]."""

    op: str
    m: int
    n: int
    k: int
    epilogue: Epilogue | None = None


class Timing(NamedTuple):
    """What one shape came to: microseconds of each backend that can run it, the fastest first."""

    shape: Shape
    us: dict[str, float]


def stream_shapes(width: int, rows: int) -> list[Shape]:
    """Return the calls that slicing makes on ``rows`` tokens of a stream of that width: the ops without a weight."""
    ops = [op for op in OPS.values() if op.regime(rows) == "tall"]
    return [Shape(op.name, rows, width, width, epilogue) for op in ops for epilogue in op.epilogues]


def tune(shapes: Iterable[Shape], dtype: torch.dtype) -> Iterator[Timing]:
    """Measure every backend on each shape, with each of its tiles, into the user's table; yield each result.

    A backend whose result differs from the reference's is warned of and counts as not measured.

    Raises:
        InputError: there is no CUDA device.
    """
    device = current_gpu()
    from slicegpt_fast.triton_kernels.tiles import choose_tile

    for shape in dict.fromkeys(shapes):
        op = OPS[shape.op]
        request = Request(shape.op, device, dtype, op.regime(shape.m), (shape.m, shape.n, shape.k), shape.epilogue)
        arguments = op.operands(request)
        expected = results_of(op.backends["reference"].run, arguments)
        us: dict[str, float] = {}
        tile = None
        for name, backend in op.backends.items():
            if op.refusal(name, request) is not None:
                continue
            times: dict[tuple[Any, ...], float] = {}
            choices: list[tuple[Any, ...]] = [(tile,) for tile in backend.tiles(request)] or [()]
            for choice in choices:
                call = (*arguments, *choice)
                if _agrees(backend.run, call, expected):
                    times[choice] = microseconds(partial(backend.run, call[0].clone(), *call[1:]))
                else:
                    what = f"{name} with {choice[0]}" if choice else name
                    warnings.warn(f"{what} gives wrong results for {shape} and is left out: report it.", stacklevel=2)
            if times:
                best = min(times, key=times.__getitem__)
                us[name], tile = round(times[best], 2), best[0] if best else tile
        entry = measured.Entry(us, None if tile is None else asdict(tile))
        measured.record(
            measured.gpu_name(device), shape.op, measured.bucket(dtype, request.shape, shape.epilogue), entry
        )
        op.forget()
        choose_tile.cache_clear()
        yield Timing(shape, dict(sorted(us.items(), key=lambda item: item[1])))


def microseconds(run: Callable[[], Any]) -> float:
    """Return the median time of ``run`` on the GPU, with a cold cache; infinite where the GPU cannot hold its tile."""
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    try:
        return 1e3 * do_bench(run, return_mode="median")
    except OutOfResources:
        return math.inf


def results_of(run: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """Return what a call computes: its results, or the first argument that it changed in place."""
    first = arguments[0].clone() if arguments[0].dtype == torch.float64 else arguments[0]
    returned = run(first, *arguments[1:])
    return returned if isinstance(returned, tuple) else (first if returned is None else returned,)


def _agrees(run: Callable[..., Any], arguments: tuple[Any, ...], expected: tuple[Tensor, ...]) -> bool:
    """True where the results are the expected ones, or the GPU cannot hold the tile."""
    from triton.runtime.errors import OutOfResources

    try:
        results = results_of(run, arguments)
    except OutOfResources:
        return True  # its time is infinite
    return all(_alike(a.double(), b.double()) for a, b in zip(results, expected, strict=True))


def _alike(value: Tensor, expected: Tensor) -> bool:
    """Return whether each row and each column is the expected one: one of thousands may be wrong."""
    value, expected = (x.reshape(len(x), -1) for x in (value, expected))
    for axis in (0, 1):
        norms = expected.norm(dim=axis)
        allowed = TOLERANCE * norms.clamp(min=norms.square().mean().sqrt())
        if not bool(((value - expected).norm(dim=axis) <= allowed).all()):
            return False
    return True


def current_gpu() -> torch.device:
    """Return the GPU to measure; raise InputError where there is none."""
    if not torch.cuda.is_available():
        raise InputError("there is no CUDA device to tune for; run tune on a machine with a GPU.")
    return torch.device("cuda", torch.cuda.current_device())
