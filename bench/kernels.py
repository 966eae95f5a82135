"""What the kernel benchmarks share: timing, the result file, the table.

Times are medians, on random data. On a GPU: with L2 overwritten before every run (prefill, covariance) or with so many
copies of the operands in one CUDA graph that none is still in L2 when its turn comes again (decode). On a CPU: over so
many copies that none is still in the last cache. Baselines run in the same process, right beside the kernel: on a CPU
in turns with it, because its clock and its neighbours change.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from triton.testing import do_bench

from slicegpt_fast.errors import InputError
from slicegpt_fast.native import cpu_isa

CPU_CACHE_BYTES = 96 << 20  # more than the last cache of the machines that are measured
L2_BYTES = 64 << 20  # at least what any supported GPU has


def median_us(call: Callable[[], Any]) -> float:
    """Microseconds of one call, launched eagerly behind a kernel that overwrites L2."""
    return 1e3 * do_bench(call, warmup=50, rep=300, return_mode="median")


def graph_us(calls: list[Callable[[], Any]]) -> float:
    """Microseconds of one of ``calls``, captured one after the other in a CUDA graph."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return 1e3 * do_bench(graph.replay, warmup=50, rep=300, return_mode="median") / len(calls)


def unless_refused(measure: Callable[[Any], float], calls: Any) -> float | None:
    """``measure(calls)``, or None where the backend that they ask for cannot run here."""
    try:
        return measure(calls)
    except InputError:
        return None


def copies(bytes_each: int) -> int:
    """How many sets of operands keep L2 from holding one until its next turn."""
    return max(4, 3 * L2_BYTES // bytes_each)


def copy_bandwidth() -> float:
    """Bytes per second, read and written, of a device-to-device copy of 1 GiB."""
    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / (1e-6 * median_us(lambda: target.copy_(source)))


def interleaved_us(calls: Mapping[str, Sequence[Callable[[], Any]]], rounds: int = 9) -> dict[str, float]:
    """Microseconds of one call of each name on the CPU; in a round, every name has its turn."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, sequence in calls.items():
            sequence[-1]()  # threads awake, code loaded
            start = time.perf_counter()
            for call in sequence:
                call()
            times[name].append(1e6 * (time.perf_counter() - start) / len(sequence))
    return {name: statistics.median(measured) for name, measured in times.items()}


def cpu_copies(bytes_each: int) -> int:
    """How many sets of operands keep the CPU's caches from holding one until its next turn."""
    return CPU_CACHE_BYTES // bytes_each + 2


def read_bandwidth() -> float:
    """Bytes per second at which torch reads 512 MiB: the best of its reductions and its product with a vector."""
    source = torch.randn(1 << 27)
    halves = source.view(torch.float16).view(-1, 4096)
    product = partial(torch.mv, halves, torch.ones(4096, dtype=torch.float16))
    readers = {"sum": [source.sum], "amax": [source.amax], "norm": [source.norm], "mv": [product]}
    return source.nbytes / (1e-6 * min(interleaved_us(readers, rounds=3).values()))


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as a Markdown table."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    values = [[row.get(name, "") for name in names] for row in rows]
    cells = [[f"{value:.3g}" if isinstance(value, float) else str(value) for value in line] for line in values]
    return "\n".join("| " + " | ".join(line) + " |" for line in (names, ["---"] * len(names), *cells))


def main(op: str, on_gpu: Callable[[], list[dict[str, Any]]], on_cpu: Callable[[], list[dict[str, Any]]]) -> None:
    """Runs a benchmark from the command line, on the GPU if there is one: writes OUT/<op>.json and prints the table."""
    parser = argparse.ArgumentParser(description=f"Benchmark of {op} against torch.")
    parser.add_argument("--out", type=Path, default=Path("build/bench"), help="folder for the JSON file")
    out = parser.parse_args().out
    torch.manual_seed(0)
    machine: dict[str, Any] = {"torch": torch.__version__}
    if torch.cuda.is_available():
        machine |= {"device": torch.cuda.get_device_name(), "triton": triton.__version__, "cuda": torch.version.cuda}
    else:
        machine |= {"device": f"{platform.machine()}, {cpu_isa()}", "threads": torch.get_num_threads()}
    rows = (on_gpu if torch.cuda.is_available() else on_cpu)()
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{op}.json").write_text(json.dumps(machine | {"op": op, "rows": rows}, indent=1) + "\n")
    print(f"{op} on {machine['device']}, torch {torch.__version__}\n\n{table(rows)}\n")
