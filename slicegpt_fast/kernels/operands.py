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
