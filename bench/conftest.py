"""Makes rows of pytest-benchmark out of contenders that were timed in turn, and describes the machine.

A row is the first contender's times; the others, bytes, FLOPs and the floor stand in its ``extra_info``.
"""

import os

os.environ.setdefault("OMP_PROC_BIND", "true")  # each thread stays on its core; read when torch is first imported

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from statistics import median
from typing import Any

import pytest
import torch
from timing import DEVICE, seconds

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
    """record(times, ...): the times of each contender, by name, become a row; the baseline is called "reference"."""

    def run(times: Mapping[str, list[float]], **extra: Any) -> None:
        ours, *_ = times.values()
        replay.load(ours)
        benchmark.group = request.node.originalname.removeprefix("bench_")
        benchmark.pedantic(lambda: None, rounds=len(ours))
        benchmark.extra_info |= extra | {
            "seconds": {name: median(rounds) for name, rounds in times.items()},
            "times as fast": {
                name: median(theirs / own for theirs, own in zip(rounds, ours, strict=True))
                for name, rounds in list(times.items())[1:]
            },
        }
        if "floor" in extra:
            benchmark.extra_info["share of floor"] = extra["floor"] / median(ours)

    return run


@pytest.fixture
def measure(record):
    """measure(contenders, dtype=, bytes=, flops=): times them in turn and records the row with its floor."""
    torch.manual_seed(0)
    torch._dynamo.reset()

    def run(contenders: Mapping[str, Any], *, dtype: str, bytes: int, flops: int, **extra: Any) -> None:
        before = machine_rates(DEVICE, getattr(torch, dtype))
        times = seconds(contenders)
        after = machine_rates(DEVICE, getattr(torch, dtype))
        bandwidth, rate = map(max, before, after)
        floor = {"read_bandwidth": bandwidth, "matmul_rate": rate, "floor": max(bytes / bandwidth, flops / rate)}
        record(times, bytes=bytes, flops=flops, **floor, **extra)

    return run
