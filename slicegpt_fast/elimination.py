"""Elimination in a damped least-squares problem: what cutting rows and rounding weights have in common.

A linear layer W with inputs x, one row of W^T per input, is to give up the inputs B, or to hold given values there. In
the metric A = C + damping meandiag(C) I of the inputs' covariance C, with H = A^-1, the best change of the others is

    W_S  <-  W_S - H_SB H_BB^-1 (change of W_B),         H  <-  H - H_:B H_BB^-1 H_B:

the second being the problem that is left. A cut changes W_B to zero (SparseGPT, arXiv 2301.00774); error feedback
changes it to what the levels of 8 or 4 bits can hold (GPTQ, arXiv 2210.17323). With H_BB = L L^T, both go by the rows
L^-1 H_B:, which are those of the upper Cholesky factor of H in the order in which the inputs are taken.
"""

import torch
from torch import Tensor


def damped(inputs: Tensor, damping: float) -> Tensor:
    """Return A = C + damping meandiag(C) I, the metric of a layer's inputs; the identity where C is zero."""
    mean = inputs.diagonal().mean()
    ridge = torch.where(mean > 0, damping * mean, 1.0)
    return inputs + torch.diag(ridge.expand(len(inputs)))


def inverse_metric(inputs: Tensor, damping: float) -> Tensor:
    """Return H = (C + damping meandiag(C) I)^-1, [F, F] fp64."""
    return torch.cholesky_inverse(torch.linalg.cholesky(damped(inputs.double(), damping)))


def take_(inverse: Tensor, block: Tensor | slice) -> Tensor:
    """Take inputs out of the problem: H loses them in place.

    Args:
        inverse: H [F, F] fp64.
        block: the indices of B inputs, none of them taken before.

    Returns:
        L^-1 H_B:, [B, F]: what the others lose is its transpose times L^-1 (change of W_B). Its columns of the block
        itself are L^T.
    """
    rows = inverse[block]
    taken = torch.linalg.solve_triangular(torch.linalg.cholesky(rows[:, block]), rows, upper=False)
    inverse.addmm_(taken.T, taken, alpha=-1)
    return taken
