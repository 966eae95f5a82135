"""The stream: what it costs to slice the residual stream to the span of one basis Q [D, d], re-fitted readers included.

A site's readers get, in place of the normalised stream n, its damped least-squares estimate from Q^T n. In coordinates
of the whole basis (Q and what it leaves out, D columns), with A = mean n n^T + 0.01 meandiag I there and H = A^-1, the
estimate's error covariance is zero but for the deleted coordinates B, where it is the Schur complement (H_BB)^-1. With
G the covariance of the gradient at n, in the same coordinates,

    1/2 sum over sites of tr(G E)  =  1/2 sum over sites of tr(G_BB (H_BB)^-1)

One inverse per site then serves all widths. What is left out is that the sites' errors are one deletion's, hence
correlated, and that each changes the stream before the next.
"""

from collections.abc import Iterable, Sequence
from functools import reduce

import torch
from torch import Tensor

from slicegpt_fast.slicing.bases import REFIT_DAMPING, principal_components
from slicegpt_fast.slicing.cuts.curve import Curve
from slicegpt_fast.slicing.cuts.sensitivity import SiteStatistics


def stream_curve(sites: Iterable[SiteStatistics], basis: Tensor, widths: Sequence[int]) -> Curve:
    """Return the predicted loss per token against the width of the stream.

    Args:
        sites: the statistics of every norm site.
        basis: [D, D] fp64, orthonormal; a slice to d keeps the first d columns.
        widths: the sizes d to predict, beside D.
    """
    full = len(basis)
    sizes = [full, *sorted({width for width in widths if width < full}, reverse=True)]
    losses = [0.0] * len(sizes)
    for site in sites:
        metric = basis.T @ site.inputs @ basis
        metric.diagonal().add_(REFIT_DAMPING * metric.diagonal().mean())
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(metric))
        gradients = basis.T @ site.gradients @ basis
        for index, size in enumerate(sizes[1:], 1):
            error = torch.linalg.inv(inverse[size:, size:])
            losses[index] += 0.5 * (gradients[size:, size:] * error).sum().item()
    return Curve(tuple(sizes), tuple(losses))


def shared_basis(sites: Iterable[SiteStatistics]) -> Tensor:
    """Return the principal components [D, D] of all sites' normalised streams together, the largest first."""
    return principal_components(reduce(torch.add, (site.inputs for site in sites)))[1]
