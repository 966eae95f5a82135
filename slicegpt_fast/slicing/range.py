"""Rotation gathers many directions in few: the largest numbers grow, in 16 bits beyond the dtype's range."""

import warnings
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from slicegpt_fast.architectures import at
from slicegpt_fast.errors import InputError

NEAR = 0.5  # of the dtype's largest number
REMEDY = "load the model with dtype=torch.bfloat16 or torch.float32"


def check_range(model: nn.Module, paths: Iterable[str]) -> None:
    """Raise InputError where a rotated weight below ``paths`` is not finite in its dtype."""
    for path in paths:
        for name, parameter in at(model, path).named_parameters(prefix=path):
            if not parameter.isfinite().all():
                raise InputError(f"{name} overflows {parameter.dtype} when it is rotated: {REMEDY}.")


class StreamRange:
    """The largest norm among the stream's rows, which bounds what a rotated stream holds."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._limit = torch.finfo(dtype).max if dtype == torch.float16 else None  # the others reach 1e38
        self._dtype, self._largest, self._path = dtype, 0.0, ""

    def see(self, rows: Tensor, path: str) -> None:
        """Take note of rows [N, D] that enter the norm at ``path``."""
        if self._limit is not None:
            largest = float(torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32).max())
            if largest > self._largest:
                self._largest, self._path = largest, path

    def warn(self) -> None:
        """Warn where the stream came near the dtype's largest number."""
        if self._limit is not None and self._largest > NEAR * self._limit:
            warnings.warn(
                f"the stream that enters {self._path} reaches a norm of {self._largest:.3g}, and {self._dtype} holds "
                f"{self._limit:.3g} at most, which a rotated stream may exceed: {REMEDY}.",
                stacklevel=3,
            )
