"""What the benchmarks share: operands, timing, the table.

Times are of one call, on random data, and all contenders of a row take turns, round by round, because clocks and
neighbours change. Where a call is bound by streaming its weights, each round goes through so many copies of them that
none is still in the last cache when its turn comes again. On a GPU a round is the replay of a CUDA graph, timed by
events; on a CPU the threads are pinned (bench/conftest.py).
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch

from slicegpt_fast import InputError

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CACHE_BYTES = {"cpu": 96 << 20, "cuda": 192 << 20}[DEVICE.type]  # more than the last caches of the measured machines
ROUNDS = {"cpu": 21, "cuda": 31}[DEVICE.type]
SECONDS = 1.5  # for the rounds of one row, but three of them at least
PREFILL_ROWS = {"cpu": 256, "cuda": 4096}[DEVICE.type]
AWAKE = torch.ones(1 << 18)
COMPILE_MODE = {"cpu": "default", "cuda": "max-autotune-no-cudagraphs"}[DEVICE.type]

KERNELS = {"cpu": (), "cuda": ("triton", "cuda")}[DEVICE.type]  # backends to be timed beside what `auto` chooses

Calls = Sequence[Callable[[], Any]]  # the same call on different operands


def random(*shape: int, dtype: str) -> torch.Tensor:
    """Normal values, scaled as weights and activations are, on DEVICE."""
    return (torch.randn(shape, device=DEVICE) / shape[-1] ** 0.5).to(getattr(torch, dtype))


def copies(bytes_each: int, rows: int) -> int:
    """How many sets of operands a round goes through."""
    return CACHE_BYTES // bytes_each + 2 if rows <= 16 else 2


def compiled(formulation: Callable[..., Any]) -> Callable[..., Any]:
    """``formulation`` under torch.compile, for the shapes it is called with."""
    return torch.compile(formulation, mode=COMPILE_MODE, dynamic=False)


def by_kernel(calls: Callable[[str], Calls]) -> dict[str, Calls]:
    """``calls`` on each of KERNELS that can run them."""
    found = {}
    for backend in KERNELS:
        with suppress(InputError):
            calls(backend)[0]()
            found[backend] = calls(backend)
    return found


def seconds(contenders: Mapping[str, Calls]) -> dict[str, list[float]]:
    """Seconds of one call of each contender, in every round."""
    timers = {name: _replay(calls) if DEVICE.type == "cuda" else _clock(calls) for name, calls in contenders.items()}
    round_seconds = sum(timer() for timer in timers.values())
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(max(3, min(ROUNDS, int(SECONDS / round_seconds)))):
        for name in list(timers)[:: 1 - 2 * (turn % 2)]:  # there and back: nobody always follows the same one
            times[name].append(timers[name]() / len(contenders[name]))
    return times


def _clock(calls: Calls) -> Callable[[], float]:
    calls[0]()  # compiles what is to be compiled

    def timer() -> float:
        AWAKE.sum()  # so are the threads
        begin = time.perf_counter()
        for call in calls:
            call()
        return time.perf_counter() - begin

    return timer


def _replay(calls: Calls) -> Callable[[], float]:
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def timer() -> float:
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return 1e-3 * begin.elapsed_time(end)

    return timer


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as a Markdown table."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    values = [[row.get(name, "") for name in names] for row in rows]
    cells = [[f"{value:.3g}" if isinstance(value, float) else str(value) for value in line] for line in values]
    return "\n".join("| " + " | ".join(line) + " |" for line in (names, ["---"] * len(names), *cells))
