"""Kernels run on the GPU where there is one, else in the interpreter, asked for before they are imported."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``dtype``: those that this machine's Triton gets right (the interpreter's bf16 matmul is garbage)."""
    if "dtype" in metafunc.fixturenames:
        half = [torch.float16, torch.bfloat16] if torch.cuda.is_available() else [torch.float16]
        metafunc.parametrize("dtype", [*half, torch.float32], ids=lambda dtype: str(dtype).removeprefix("torch."))
