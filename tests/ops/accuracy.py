"""The tolerance rule of the matmul kernels, and inputs that are hard on it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def assert_as_good_as_torch(value: Tensor, by_torch: Tensor, exact: Tensor) -> None:
    """The largest error is at most twice that of torch in the same dtype, plus one rounding of the largest value."""
    assert value.dtype == by_torch.dtype
    assert value.shape == exact.shape
    error = (value.double() - exact).abs().max().item()
    allowed = 2 * (by_torch.double() - exact).abs().max().item()
    allowed += torch.finfo(value.dtype).eps / 2 * exact.abs().max().item()
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"


def device_of(backend: str) -> str:
    """Where the tests of a backend run."""
    return "cuda" if backend != "cpu" and torch.cuda.is_available() else "cpu"


def double(x: object) -> object:
    """The same arguments in fp64."""
    if isinstance(x, tuple):
        return tuple(map(double, x))
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def apart(x: object) -> object:
    """The same arguments as contiguous tensors, beside which there is nothing that torch's own matmul could read."""
    if isinstance(x, tuple):
        return tuple(map(apart, x))
    return x.clone(memory_format=torch.contiguous_format) if isinstance(x, Tensor) else x


def random(*shape: int, dtype: torch.dtype, device: str, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, device=device) * scale).to(dtype)


def poisoned(x: Tensor) -> Tensor:
    """A view that holds the values of ``x`` amid NaN: a kernel that reads beside it shows."""
    store = torch.full((x.shape[0] + 2, x.shape[1] + 5), float("nan"), dtype=x.dtype, device=x.device)
    view = store[1:-1, 3:-2]
    view.copy_(x)
    return view


@contextmanager
def other_defaults() -> Iterator[None]:
    """Inside, torch makes tensors of another dtype on another device where neither is said."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            yield
    finally:
        torch.set_default_dtype(before)
