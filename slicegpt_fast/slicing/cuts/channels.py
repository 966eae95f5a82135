"""Channels: which rows of an MLP's writer W [F, D] go, and what the others become.

With S the channels that stay, the writer is re-fitted to what the dense one makes of the calibration text, in the
metric of the statistics C and J (see ``sensitivity``) and damped towards W:

    W' = argmin tr((W' - W)^T A (W' - W) J) over rows S  =  A_SS^-1 (A W)_S,      A = C + 0.3 meandiag(C) I

The damping is against fitting the calibration text too closely. Channels are removed by backward elimination in that
problem, damped by 0.1: with H = A^-1 and V = W R, R R^T = J, taking the channels
B costs tr(V_B^T H_BB^-1 V_B), exactly, and leaves the problem of the others with

    V <- V - H_:B H_BB^-1 V_B,      H <- H - H_:B H_BB^-1 H_B:

Each step takes the channels of the lowest |V_j|^2 / H_jj, what each would cost alone. Readers only lose rows: an
activation is elementwise. Two matrix products per step, about 2 F^2 (F + D) multiplications in all, in fp64.
"""

import torch
from torch import Tensor

from slicegpt_fast.elimination import damped, inverse_metric, take_
from slicegpt_fast.slicing.cuts.curve import Curve

# Shares of the mean diagonal of C. Of 0.1, 0.3 and 0.6 the second repairs best on text that is neither for calibration
# nor in any table (SmolLM2 at 0.8: perplexity 22.52, 22.42, 22.44).
DAMPING, REPAIR_DAMPING = 0.1, 0.3


def eliminate(writer: Tensor, inputs: Tensor, gradients: Tensor, *, step: int = 32) -> tuple[Tensor, Curve]:
    """Order the channels of a writer by what they are worth.

    Args:
        writer: W [F, D], one row per channel.
        inputs: C [F, F].
        gradients: J [D, D].
        step: how many channels are taken at once; the sizes of the curve are its multiples, and F.

    Returns:
        order: [F] int64, the channels as they are removed, the most valuable last.
        curve: predicted loss per token against channels kept, from F down to ``step`` (or F, where that is less).
    """
    width = len(writer)
    inverse = inverse_metric(inputs, DAMPING)
    costly = writer.double() @ root(gradients)
    removed = torch.zeros(width, dtype=torch.bool, device=writer.device)
    order: list[Tensor] = []
    sizes, losses = [width], [0.0]
    while (kept := sizes[-1]) > step:
        scores = (costly.square().sum(1) / inverse.diagonal()).masked_fill_(removed, torch.inf)
        block = scores.topk(kept % step or step, largest=False).indices
        taken = take_(inverse, block)
        lost = torch.linalg.solve_triangular(taken[:, block].T, costly[block], upper=False)
        costly.addmm_(taken.T, lost, alpha=-1)
        removed[block] = True
        order.append(block)
        sizes.append(kept - len(block))
        losses.append(losses[-1] + 0.5 * lost.square().sum().item())
    scores = (costly.square().sum(1) / inverse.diagonal()).masked_fill_(removed, torch.inf)
    order.append(scores.argsort()[: sizes[-1]])
    return torch.cat(order), Curve(tuple(sizes), tuple(losses))


def survivors(order: Tensor, size: int) -> Tensor:
    """Return the indices [size] of the channels that stay, ascending."""
    return order[len(order) - size :].sort().values


def repair(writer: Tensor, inputs: Tensor, kept: Tensor) -> Tensor:
    """Return the re-fitted rows A_SS^-1 (A W)_S of a writer, [size, D] fp64.

    Args:
        writer: W [F, D].
        inputs: C [F, F].
        kept: indices [size] of the rows S.
    """
    metric = damped(inputs.double(), REPAIR_DAMPING)[kept]
    factor = torch.linalg.cholesky(metric[:, kept])
    return torch.cholesky_solve(metric @ writer.double(), factor)


def root(positive: Tensor) -> Tensor:
    """Return R with R R^T equal to a symmetric positive semidefinite matrix [..., D, D], in fp64."""
    values, vectors = torch.linalg.eigh(positive.double())
    return vectors * values.clamp(min=0).sqrt().unsqueeze(-2)
