"""Small problems of a cut: inputs, gradients and a writer with uneven spectra, in fp64."""

import torch
from torch import Tensor


def rows(number: int, width: int) -> Tensor:
    """Correlated rows [number, width] of uneven directions, with a mean that is not zero."""
    mixing = torch.randn(width, width, dtype=torch.float64) * torch.logspace(0, -1.5, width, dtype=torch.float64)
    return torch.randn(number, width, dtype=torch.float64) @ mixing.T + 0.3 * torch.randn(width, dtype=torch.float64)


def second_moment(samples: Tensor) -> Tensor:
    return samples.T @ samples / len(samples)


def problem(width: int, outputs: int) -> tuple[Tensor, Tensor, Tensor]:
    """A writer [width, outputs], C [width, width], J [outputs, outputs]."""
    writer = torch.randn(width, outputs, dtype=torch.float64)
    return writer, second_moment(rows(200, width)), second_moment(rows(200, outputs))


def error(change: Tensor, inputs: Tensor, gradients: Tensor) -> float:
    """1/2 tr(dW^T A dW J)."""
    return 0.5 * (change.T @ inputs @ change @ gradients).trace().item()
