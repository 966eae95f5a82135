"""The stream's curve against least squares on raw rows."""

import pytest
import torch
from slicing.cuts.problems import rows, second_moment

from slicegpt_fast.slicing.bases import REFIT_DAMPING
from slicegpt_fast.slicing.cuts.sensitivity import SiteStatistics
from slicegpt_fast.slicing.cuts.stream import shared_basis, stream_curve


def test_the_curve_is_the_loss_of_the_damped_estimates_of_the_normalised_stream():
    """Rows of identity beside the samples are the damping: they ask for an estimate of Q^T of each direction too."""
    streams = [rows(80, 12) for _ in range(3)]
    moments = [second_moment(rows(60, 12)) for _ in range(3)]
    sites = [SiteStatistics(second_moment(n), g) for n, g in zip(streams, moments, strict=True)]
    basis = shared_basis(sites)
    curve = stream_curve(sites, basis, [9, 5, 12, 2])
    assert curve.sizes == (12, 9, 5, 2)
    assert curve.losses[0] == 0
    for size, loss in zip(curve.sizes[1:], curve.losses[1:], strict=True):
        expected = 0.0
        for samples, gradients in zip(streams, moments, strict=True):
            scaled = samples / len(samples) ** 0.5
            ridge = (REFIT_DAMPING * scaled.square().sum() / 12).sqrt() * torch.eye(12, dtype=torch.float64)
            n = torch.cat([scaled, ridge])
            x = n @ basis[:, :size]
            left = n - x @ torch.linalg.lstsq(x, n).solution
            expected += 0.5 * (gradients * (left.T @ left)).sum().item()
        assert loss == pytest.approx(expected)


def test_the_shared_basis_is_that_of_all_sites_together():
    streams = [rows(80, 10) for _ in range(3)]
    basis = shared_basis([SiteStatistics(second_moment(n), torch.eye(10)) for n in streams])
    rotated = torch.cat(streams) @ basis
    covariance = rotated.T @ rotated
    torch.testing.assert_close(covariance, torch.diag(covariance.diagonal()), rtol=0, atol=1e-8)
    assert (covariance.diagonal().diff() < 0).all()
