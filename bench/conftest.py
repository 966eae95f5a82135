"""Makes rows of pytest-benchmark out of contenders that were timed in turn, and describes the machine.

A row is the first contender's blocks; the others' blocks, bytes, FLOPs and the floor stand in its ``extra_info``.
"""

import os

os.environ.setdefault("OMP_PROC_BIND", "true")  # each thread stays on its core; read when torch is first imported

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

import pytest
import torch
from timing import DEVICE, Calls, Times, seconds

from slicegpt_fast.benchmark import machine, machine_rates


class Replay:
    """A clock for pytest-benchmark: between two readings passes what was measured."""

    def __init__(self) -> None:
        self.readings: Iterator[float] = iter(())

    def load(self, rounds: Iterable[float]) -> None:
        self.readings = chain.from_iterable((0.0, duration) for duration in rounds)

    def __call__(self) -> float:
        return next(self.readings)

    def __repr__(self) -> str:
        return "replay"


replay = Replay()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="only the benchmarks marked quick, as CI runs them")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "quick: small enough to run after every change")
    if config.option.quick:
        config.option.markexpr = "quick"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=replay))


def pytest_benchmark_update_json(output_json: dict[str, Any]) -> None:
    """Who ran it is no business of the results; on what, is."""
    output_json["machine_info"] = machine(DEVICE)
    output_json["commit_info"] = {name: output_json["commit_info"][name] for name in ("id", "dirty")}


@pytest.fixture
def record(benchmark, request):
    """record(times, ...): the times of all contenders, ours first, become a row; report.py makes ratios of them."""

    def run(times: Times, **extra: Any) -> None:
        ours, *_ = times.values()
        replay.load(ours)
        benchmark.group = request.node.originalname.removeprefix("bench_")
        benchmark.pedantic(lambda: None, rounds=len(ours))
        benchmark.extra_info |= extra | {"blocks": times}

    return run


@pytest.fixture
def measure(record):
    """measure(contenders, dtype=, bytes=, flops=): times what contenders() makes and records the row with its floor."""
    torch.manual_seed(0)
    torch._dynamo.reset()

    def run(contenders: Callable[[], Mapping[str, Calls | str]], *, dtype: str, bytes: int, flops: int) -> None:
        bandwidth, rate = machine_rates(DEVICE, getattr(torch, dtype))
        times, refused = seconds(contenders)
        floor = {"read_bandwidth": bandwidth, "matmul_rate": rate, "floor": max(bytes / bandwidth, flops / rate)}
        record(times, bytes=bytes, flops=flops, refused=refused, **floor)

    return run
