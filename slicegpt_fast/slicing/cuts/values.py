"""Values: fewer dimensions of each head's value vectors, which V's rows and the output projection's columns share.

Attention mixes value vectors over positions, not over their dimensions, so any orthonormal B [head dim, r] may stand
between V and the output projection: V's rows become B^T W_v and the output projection is re-fitted to B^T x. With W_h
[head dim, D] the rows of the output projection W that query head h feeds, C and J as in ``sensitivity``, and C_g the
mean of the diagonal blocks of C that belong to the query heads of key and value head g, the best B of rank r and its
cost are

    K_g = sum_h W_h J W_h^T = R R^T,    R^T C_g R = U diag(e) U^T,    B_g = orth(R U_:r),    1/2 sum_g sum_{i > r} e_i

since B only matters through the span of C_g^(1/2) B, and the error of the re-fitted x is what lies outside. The output
projection's rows become (B^T A B)^-1 B^T A W with B block-diagonal and A = C + 0.3 meandiag(C) I, all heads at once.
One rank for all heads of a layer, so that attention runs as before on shorter values.

A value bias reaches the output projection unmixed, attention weights summing to one, so its product may stand in the
output projection's bias instead: ``fold_bias``, before anything else.
"""

from dataclasses import replace

import torch
from torch import Tensor

from slicegpt_fast.elimination import damped
from slicegpt_fast.slicing.cuts.channels import REPAIR_DAMPING, root
from slicegpt_fast.slicing.cuts.curve import Curve
from slicegpt_fast.slicing.cuts.sensitivity import WriterStatistics


def principal_values(
    writer: Tensor, inputs: Tensor, gradients: Tensor, *, heads: int, head_dim: int, step: int = 8
) -> tuple[Tensor, Curve]:
    """Order the directions of the value vectors by what they are worth.

    Args:
        writer: W [query heads * head dim, D], one row per input of the output projection.
        inputs: C [query heads * head dim, query heads * head dim].
        gradients: J [D, D].
        heads: the number of key and value heads; consecutive query heads share one.
        head_dim: that of the value vectors.
        step: the ranks of the curve are its multiples, and the head dim.

    Returns:
        bases: [heads, head dim, head dim] fp64 with orthonormal columns; B_g of rank r are the first r.
        curve: predicted loss per token against rank.
    """
    scaled = (writer.double() @ root(gradients)).unflatten(0, (heads, -1, head_dim))
    scaled = scaled.transpose(1, 2).flatten(2)  # [G, head dim, query heads of g * D]
    blocks = inputs.double().view(-1, head_dim, len(inputs) // head_dim, head_dim).diagonal(dim1=0, dim2=2)
    shared = blocks.movedim(-1, 0).unflatten(0, (heads, -1)).mean(1)
    factor = root(scaled @ scaled.mT)
    values, vectors = torch.linalg.eigh(factor.mT @ shared @ factor)
    bases = torch.linalg.qr(factor @ vectors.flip(-1)).Q
    beyond = 0.5 * values.clamp(min=0).sum(0).cumsum(0)  # of the i + 1 lowest
    ranks = [head_dim, *range((head_dim - 1) // step * step, 0, -step)]
    return bases, Curve(tuple(ranks), tuple(beyond[head_dim - r - 1].item() if r < head_dim else 0.0 for r in ranks))


def project(rows: Tensor, bases: Tensor, rank: int) -> Tensor:
    """Return B^T times the rows of each head, fp64: [n * head dim, ...] -> [n * rank, ...].

    Args:
        rows: V's rows or bias, n = G; or anything with a row per input of the output projection, n the query heads.
        bases: [G, head dim, head dim], from :func:`principal_values`.
        rank: how many columns of each basis are taken.
    """
    heads, head_dim, _ = bases.shape
    grouped = rows.double().reshape(heads, -1, head_dim, rows[0].numel())
    return (bases[:, None, :, :rank].mT @ grouped).reshape(-1, *rows.shape[1:])


def refit(writer: Tensor, inputs: Tensor, bases: Tensor, rank: int) -> Tensor:
    """Return the re-fitted rows (B^T A B)^-1 B^T A W of the output projection, [query heads * rank, D] fp64.

    Args:
        writer: W [query heads * head dim, D].
        inputs: C [query heads * head dim, query heads * head dim].
        bases, rank: as in :func:`project`.
    """
    metric = project(damped(inputs.double(), REPAIR_DAMPING), bases, rank)
    factor = torch.linalg.cholesky(project(metric.T, bases, rank))
    return torch.cholesky_solve(metric @ writer.double(), factor)


def fold_bias(
    statistics: WriterStatistics, writer: Tensor, bias: Tensor, *, head_dim: int
) -> tuple[WriterStatistics, Tensor]:
    """Take the value bias out of the output projection's inputs.

    Args:
        statistics: of the output projection.
        writer: W [query heads * head dim, D].
        bias: [heads * head dim], of V.
        head_dim: that of the value vectors.

    Returns:
        statistics: those of the inputs without the bias.
        gain: [D] fp64, what the output projection's bias gains.
    """
    sharing = len(writer) // len(bias)  # query heads per key and value head
    bias = bias.double().view(-1, 1, head_dim).expand(-1, sharing, -1).flatten()
    crossed = torch.outer(statistics.mean, bias)
    inputs = statistics.inputs - crossed - crossed.T + statistics.mass * torch.outer(bias, bias)
    mean = statistics.mean - statistics.mass * bias
    return replace(statistics, inputs=inputs, mean=mean), bias @ writer.double()
