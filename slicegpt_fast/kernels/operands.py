"""The layouts of tensors that kernels take. None stands for an operand that is not there."""

from __future__ import annotations

from typing import overload

from torch import Tensor


def has_rows(x: Tensor) -> bool:
    """Return whether each row of a matrix is contiguous."""
    return x.stride()[1] == 1 or x.shape[1] == 1


@overload
def rows(x: Tensor) -> Tensor: ...
@overload
def rows(x: Tensor | None) -> Tensor | None: ...
def rows(x: Tensor | None) -> Tensor | None:
    """Return a matrix itself where its rows are contiguous, else a contiguous copy."""
    return x if x is None or has_rows(x) else x.contiguous()


@overload
def rows_or_columns(x: Tensor) -> Tensor: ...
@overload
def rows_or_columns(x: Tensor | None) -> Tensor | None: ...
def rows_or_columns(x: Tensor | None) -> Tensor | None:
    """Return a matrix itself where its rows or its columns are contiguous, else a contiguous copy."""
    return x if x is None or 1 in x.stride() else x.contiguous()


def vector(x: Tensor | None) -> Tensor | None:
    """Return a vector itself where it is contiguous, else a contiguous copy."""
    return None if x is None else x.contiguous()


def heads(x: Tensor) -> Tensor:
    """Return the first number of each head of x [B, T, heads, D]: [B T, heads], with contiguous heads behind them."""
    x = x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()
    return x.flatten(0, 1).select(2, 0)


@overload
def tokens(x: Tensor) -> Tensor: ...
@overload
def tokens(x: Tensor | None) -> Tensor | None: ...
def tokens(x: Tensor | None) -> Tensor | None:
    """Return x [1 or B, T, n] as [T or B T, n] with contiguous rows."""
    return None if x is None else rows(x.flatten(0, 1))


def cache(x: Tensor) -> Tensor:
    """Return a cache [B, G, C, D] as [B G, C D]: a view, which kernels write through."""
    B, G, C, D = x.shape
    return x.as_strided((B * G, C * D), (x.stride(1), 1))
