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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        parameters = getattr(item, "callspec", None)
        later = parameters is not None and parameters.params.get("family") in LATER
        if later and item.originalname not in FOR_ALL_FAMILIES:
            item.add_marker(pytest.mark.slow)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
