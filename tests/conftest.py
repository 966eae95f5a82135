"""Tests marked `gpu` are skipped where there is no GPU; Triton kernels run in the interpreter there."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # several of them share the cores; read when torch is first imported
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton

from models import LATER


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test draws the same numbers in every run, alone or among others."""
    torch.manual_seed(0)


# The tests that are fast for every family; all others of one in LATER are slow.
FOR_ALL_FAMILIES = (
    "test_channels_of_a_feed_forward_network",
    "test_values_of_an_attention",
    "test_heads_of_an_attention",
    "test_no_sparsity_leaves_the_logits",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--thorough", action="store_true", help="run all tests marked thorough, and all of every family")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    later: dict[tuple[str, str], list[pytest.Item]] = {}
    for item in items:
        family = item.callspec.params.get("family") if hasattr(item, "callspec") else None
        if family in LATER:
            later.setdefault((item.nodeid.partition("[")[0], family), []).append(item)
            if item.originalname not in FOR_ALL_FAMILIES:
                item.add_marker(pytest.mark.slow)
    if not config.getoption("--thorough"):  # one of a test's combinations for each of LATER, all of them in turn
        order = list(LATER)
        kept = {id(group[order.index(family) % len(group)]) for (_, family), group in later.items()}
        left = {id(item) for group in later.values() for item in group} - kept
        left |= {id(item) for item in items if item.get_closest_marker("thorough")}
        config.hook.pytest_deselected(items=[item for item in items if id(item) in left])
        items[:] = [item for item in items if id(item) not in left]
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
