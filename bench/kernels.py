"""What the kernel benchmarks share: timing, the result file, the table.

Times are medians, on random data, with L2 overwritten before every run (prefill, covariance) or with so many copies of
the operands in one CUDA graph that none is still in L2 when its turn comes again (decode). Baselines run in the same
process, right beside the kernel.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from triton.testing import do_bench

from slicegpt_fast.errors import InputError

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


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as a Markdown table."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    values = [[row.get(name, "") for name in names] for row in rows]
    cells = [[f"{value:.3g}" if isinstance(value, float) else str(value) for value in line] for line in values]
    return "\n".join("| " + " | ".join(line) + " |" for line in (names, ["---"] * len(names), *cells))


def main(op: str, measure: Callable[[], list[dict[str, Any]]]) -> None:
    """Runs a benchmark from the command line: writes OUT/<op>.json and prints the table."""
    parser = argparse.ArgumentParser(description=f"Benchmark of {op} against torch, on one CUDA device.")
    parser.add_argument("--out", type=Path, default=Path("build/gpu-check"), help="folder for the JSON file")
    out = parser.parse_args().out
    if not torch.cuda.is_available():
        sys.exit("error: this benchmark needs a CUDA device.")
    torch.manual_seed(0)
    machine = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
    machine["cuda"] = str(torch.version.cuda)
    rows = measure()
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{op}.json").write_text(json.dumps(machine | {"op": op, "rows": rows}, indent=1) + "\n")
    print(f"{op} on {machine['gpu']}\n\n{table(rows)}\n")
