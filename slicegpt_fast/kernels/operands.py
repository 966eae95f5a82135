"""How kernels take tensors: rows in one piece, addresses, strides. None stands for an operand that is not there."""

from __future__ import annotations

from typing import overload

from torch import Tensor


@overload
def rows(x: Tensor) -> Tensor: ...
@overload
def rows(x: Tensor | None) -> Tensor | None: ...
def rows(x: Tensor | None) -> Tensor | None:
    """``x`` itself where each of its rows is in one piece, else a copy of which that holds."""
    return x if x is None or x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def vector(x: Tensor | None) -> Tensor | None:
    """``x`` in one piece."""
    return None if x is None else x.contiguous()


def address(x: Tensor | None) -> int:
    """Where the first element lies."""
    return 0 if x is None else x.data_ptr()


def rows_at(x: Tensor | None) -> tuple[int, int]:
    """Address, and elements from one row to the next."""
    return (0, 0) if x is None else (x.data_ptr(), x.stride(0))


def matrix_at(x: Tensor | None) -> tuple[int, int, int]:
    """Address and both strides."""
    return (0, 0, 0) if x is None else (x.data_ptr(), x.stride(0), x.stride(1))
