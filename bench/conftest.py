"""Makes rows of pytest-benchmark out of contenders that were timed in turn, and describes the machine.

What was found stands in a row's ``extra_info``: all contenders' times, ratios, bytes, FLOPs, the floor. The row's own
``stats`` are of pytest-benchmark's clock: how long the measuring (on a CPU its last visit) took.
"""

import os

os.environ.setdefault("OMP_PROC_BIND", "true")  # each thread stays on its core; read when torch is first imported

from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import pytest
import timing
import torch
from timing import DEVICE, KERNELS, MACHINE, VISITS, Calls, Found, Times, fastest, ratio, seconds

from slicegpt_fast.benchmark import PROBES, machine, machine_rates

if MACHINE == "tiny":
    PROBES["cpu"] = (1 << 20, 64)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="only the benchmarks marked quick, as CI runs them")
    parser.addoption("--no-compile", action="store_true", help="without torch.compile, which takes minutes on a GPU")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "quick: small enough to run after every change")
    timing.compiling = not config.option.no_compile
    if config.option.quick:
        config.option.markexpr = "quick"
    torch._dynamo.config.recompile_limit = 256  # one formulation is compiled for the shapes of all rows


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "visit" in metafunc.fixturenames:
        metafunc.parametrize("visit", range(VISITS))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All rows before any is visited again; whole models last."""
    items.sort(key=lambda item: item.callspec.params.get("visit", VISITS))


def pytest_benchmark_update_json(output_json: dict[str, Any]) -> None:
    """Who ran it is no business of the results; on what, is."""
    output_json["machine_info"] = machine(DEVICE)
    output_json["commit_info"] = {name: output_json["commit_info"][name] for name in ("id", "dirty")}


@pytest.fixture
def record(request):
    """record(measuring): what measuring() finds becomes a row, with the contenders' ratios."""

    def run(measuring: Callable[[], Found]) -> None:
        benchmark = request.getfixturevalue("benchmark")
        benchmark.group = request.node.originalname.removeprefix("bench_")
        benchmark.params = {name: value for name, value in benchmark.params.items() if name != "visit"}
        benchmark.name = f"{request.node.originalname}[{'-'.join(map(str, benchmark.params.values()))}]"
        benchmark.fullname = f"{request.node.path.name}::{benchmark.name}"
        times, extra = benchmark.pedantic(measuring)
        (_, ours), *others = times.items()
        # Kernels named by a backend are ours too: what they are compared with is torch.
        pairs = {name: (times["torch"], own) if name in KERNELS else (own, ours) for name, own in others}
        ratios = {name: ratio(*pair) for name, pair in pairs.items()}
        benchmark.extra_info |= extra | {
            "seconds": {name: fastest(blocks)[0] for name, blocks in times.items()},
            "seconds by block": {name: [median(turns) for turns in blocks] for name, blocks in times.items()},
            "times as fast": {name: value for name, (value, _) in ratios.items()},
            "uncertainty": {name: share for name, (_, share) in ratios.items()},
        }

    return run


# What the visits before this one found: times by row, and the best rates by dtype.
visited: dict[str, Times] = {}
rates: dict[str, tuple[float, float]] = {}


@pytest.fixture
def measure(record, request, visit):
    """measure(contenders, dtype=, bytes=, flops=): times what contenders() makes; the last visit records the row."""
    torch.manual_seed(0)

    def run(contenders: Callable[[], Mapping[str, Calls | str]], *, dtype: str, bytes: int, flops: int) -> None:
        if visit == 0:
            measured = machine_rates(DEVICE, getattr(torch, dtype))
            rates[dtype] = tuple(map(max, measured, rates.get(dtype, measured)))
        case = {name: value for name, value in request.node.callspec.params.items() if name != "visit"}
        all_times = visited.setdefault(f"{request.node.originalname} {case}", {})

        def measuring() -> Found:
            times, refused = seconds(contenders)
            for name, blocks in times.items():
                all_times.setdefault(name, []).extend(blocks)
            bandwidth, rate = rates[dtype]
            floor = {"read_bandwidth": bandwidth, "matmul_rate": rate, "floor": max(bytes / bandwidth, flops / rate)}
            return all_times, {"bytes": bytes, "flops": flops, "refused": refused, **floor}

        if visit < VISITS - 1:
            measuring()
        else:
            record(measuring)

    return run
