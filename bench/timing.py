"""What the benchmarks share: operands and timing.

Clocks, neighbours and the pages that operands come to lie on change from moment to moment, and not all contenders of a
row suffer alike. So they take turns, one call each, in several blocks of turns, each on operands newly allocated. On a
CPU a visit to a row is one block and all rows are visited again and again, so that a row's blocks are spread over
minutes; on a GPU one visit holds them all. What disturbs a block makes it slower, so a time is that of the fastest
block, which is the median of its turns; how far the second fastest is behind says how sure that is.

Where a call is bound by streaming its weights, the turns go through so many copies of them that none is still in the
last cache when its turn comes again. On a GPU, one turn of a contender is the replay of a CUDA graph of calls, timed by
events; on a CPU the threads are pinned (bench/conftest.py).
"""

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial
from itertools import cycle
from statistics import median
from typing import Any

import torch

from slicegpt_fast import InputError

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MACHINE = os.environ.get("BENCH_MACHINE", DEVICE.type)  # "tiny": shapes that show on a CPU that the benchmarks run
CACHE_BYTES = {"cpu": 96 << 20, "cuda": 192 << 20, "tiny": 0}[
    MACHINE
]  # more than the last caches of the measured machines
FEWEST_COPIES = {"cpu": 2, "cuda": 16, "tiny": 1}[
    MACHINE
]  # on a GPU all copies are in one graph: enough to time it well
LAUNCH_CLOCKS = 500_000  # of the GPU, 0.3 ms: longer than a graph takes to launch
VISITS = {"cpu": 8, "cuda": 1, "tiny": 1}[MACHINE]  # of each row in a run
BLOCKS, SECONDS = {"cpu": (1, 0.12), "cuda": (5, 0.05), "tiny": (1, 0.0)}[
    MACHINE
]  # of a visit, on operands of their own; of a block
TURNS = 3  # in a block, at least
PREFILL_ROWS = {"cpu": 128, "cuda": 4096, "tiny": 20}[MACHINE]
AWAKE = torch.ones(1 << 18)
COMPILE_MODE = {"cpu": "default", "cuda": "max-autotune-no-cudagraphs", "tiny": "default"}[MACHINE]
COMPILED_WIDTH = {"cpu": 456, "cuda": 2872, "tiny": 0}[MACHINE]  # the one that is compiled: each shape takes its time

KERNELS = {"cpu": (), "cuda": ("triton", "cuda"), "tiny": ("triton", "cuda")}[
    MACHINE
]  # backends to be timed beside what `auto` chooses

compiling = True  # False under --no-compile

Calls = Sequence[Callable[[], Any]]  # the same call on different operands
Times = dict[str, list[list[float]]]  # seconds of one call of each contender, by block and turn
Found = tuple[Times, dict[str, Any]]  # a row: the times of all contenders, ours first, and what else belongs to it


def random(*shape: int, dtype: str) -> torch.Tensor:
    """Normal values, scaled as weights and activations are, on DEVICE."""
    return (torch.randn(shape, device=DEVICE) / shape[-1] ** 0.5).to(getattr(torch, dtype))


def copies(bytes_each: int, rows: int) -> int:
    """How many sets of operands the turns go through."""
    return CACHE_BYTES // bytes_each + FEWEST_COPIES if rows <= 16 else 2


@cache
def compiled(formulation: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(formulation, mode=COMPILE_MODE, dynamic=False)


def by_torch(formulation: Callable[..., Any], width: int) -> Callable[[Iterable[Any]], dict[str, Calls | str]]:
    """Makes calls of ``formulation`` on sets of operands: as it stands, and under torch.compile."""

    def calls(sets: Iterable[Any]) -> dict[str, Calls | str]:
        found: dict[str, Calls | str] = {
            name: [partial(run, *operands) for operands in sets]
            for name, run in (("torch", formulation), ("torch.compile", compiled(formulation)))
        }
        if not compiling:
            found["torch.compile"] = "is measured in runs without --no-compile"
        elif width != COMPILED_WIDTH:
            found["torch.compile"] = f"is measured at width {COMPILED_WIDTH} alone"
        return found

    return calls


def by_kernel(calls: Callable[[str], Calls]) -> dict[str, Calls | str]:
    """``calls`` on each of KERNELS, or why that one cannot run them."""
    found: dict[str, Calls | str] = {}
    for backend in KERNELS:
        try:
            calls(backend)[0]()
            found[backend] = calls(backend)
        except InputError as refusal:
            found[backend] = str(refusal)
    return found


def seconds(contenders: Callable[[], Mapping[str, Calls | str]]) -> tuple[Times, dict[str, str]]:
    """Times contenders, made anew for each block; and says why the others cannot run."""
    times: Times = {}
    for _ in range(BLOCKS):
        made = contenders()  # before the last ones are freed: elsewhere in memory
        for name, turns in _block({n: calls for n, calls in made.items() if not isinstance(calls, str)}).items():
            times.setdefault(name, []).append(turns)
    return times, {name: why for name, why in made.items() if isinstance(why, str)}


def fastest(blocks: list[list[float]]) -> tuple[float, float]:
    """The least median of a block of turns, and how far the next one is behind, as a share of it."""
    first, *others = sorted(median(turns) for turns in blocks)
    return first, others[0] / first - 1 if others else 0.0


def ratio(theirs: list[list[float]], ours: list[list[float]]) -> tuple[float, float]:
    """How many times as long theirs took, and by what share of that it may be off; times by block."""
    (their_time, their_doubt), (our_time, our_doubt) = fastest(theirs), fastest(ours)
    return their_time / our_time, their_doubt + our_doubt


def _block(contenders: Mapping[str, Calls]) -> dict[str, list[float]]:
    """Seconds of one call of each contender, turn by turn."""
    timers = {
        name: _replay(calls) if DEVICE.type == "cuda" else _clock(calls, number / len(contenders))
        for number, (name, calls) in enumerate(contenders.items())
    }
    times: dict[str, list[float]] = {name: [] for name in timers}
    AWAKE.sum()  # so are the threads
    end, turn = time.perf_counter() + SECONDS, 0
    while turn < TURNS or time.perf_counter() < end:
        for name in list(timers)[:: 1 - 2 * (turn % 2)]:  # there and back: nobody always follows the same one
            times[name].append(timers[name]())
        turn += 1
    return times


def _clock(calls: Calls, start: float) -> Callable[[], float]:
    """Times the calls one by one, from ``start``, a share of them, on: contenders never follow one another closely."""
    first = int(start * len(calls))
    turned = (*calls[first:], *calls[:first])
    turned[-1]()  # compiles what is to be compiled
    endless = cycle(turned)

    def timer() -> float:
        call = next(endless)
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin

    return timer


def _replay(calls: Calls) -> Callable[[], float]:
    """Times all calls at once. The GPU is kept busy until all is enqueued, so that no launch is part of the time."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()  # compiles what is to be compiled
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    graph.replay()

    def timer() -> float:
        torch.cuda._sleep(LAUNCH_CLOCKS)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return 1e-3 * begin.elapsed_time(end) / len(calls)

    return timer
