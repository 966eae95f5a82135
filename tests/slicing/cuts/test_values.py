"""Values: ranks exact at full rank, optimal in the stated metric, the re-fit against least squares, biases."""

import pytest
import torch
from slicing.cuts.problems import error, problem, rows, second_moment

from slicegpt_fast.slicing.cuts.channels import REPAIR_DAMPING, damped
from slicegpt_fast.slicing.cuts.sensitivity import WriterStatistics
from slicegpt_fast.slicing.cuts.values import fold_bias, principal_values, project, refit

HEADS, SHARING, HEAD_DIM, OUTPUTS = 2, 3, 8, 10
WIDTH = HEADS * SHARING * HEAD_DIM


def principal(writer, inputs, gradients, step=2):
    return principal_values(writer, inputs, gradients, heads=HEADS, head_dim=HEAD_DIM, step=step)


def attended(values, weights):
    """What the query heads [2 heads * 3, T, T] make of values [T, heads * dim]: [T, query heads * dim]."""
    shared = values.unflatten(1, (HEADS, -1)).transpose(0, 1).repeat_interleave(SHARING, 0)
    return (weights @ shared).transpose(0, 1).flatten(1)


def test_full_rank_is_exact():
    writer, inputs, gradients = problem(WIDTH, OUTPUTS)
    bases, curve = principal(writer, inputs, gradients)
    assert curve.sizes == (8, 6, 4, 2)
    assert curve.losses[0] == 0
    reader, tokens = torch.randn(HEADS * HEAD_DIM, 6, dtype=torch.float64), rows(20, 6)
    weights = torch.rand(HEADS * SHARING, 20, 20, dtype=torch.float64)
    dense = attended(tokens @ reader.T, weights) @ writer
    cut = attended(tokens @ project(reader, bases, 8).T, weights) @ refit(writer, inputs, bases, 8)
    torch.testing.assert_close(cut, dense)


def loss_of(bases, writer, inputs, gradients):
    """1/2 sum_g sum_h tr(W_h J W_h^T E_g), E_g the error covariance of x_g's least-squares estimate from B_g^T x_g."""
    blocks = inputs.reshape(HEADS, SHARING, HEAD_DIM, HEADS, SHARING, HEAD_DIM)
    total = 0.0
    for g, basis in enumerate(bases):
        covariance = torch.stack([blocks[g, h, :, g, h] for h in range(SHARING)]).mean(0)
        estimate = covariance @ basis @ torch.linalg.inv(basis.T @ covariance @ basis) @ basis.T
        change = torch.eye(HEAD_DIM, dtype=torch.float64) - estimate
        lost = change @ covariance @ change.T
        for rows_of_head in writer.view(HEADS, SHARING, HEAD_DIM, OUTPUTS)[g]:
            total += 0.5 * (rows_of_head @ gradients @ rows_of_head.T @ lost).trace().item()
    return total


@pytest.mark.parametrize("rank", [2, 4, 6])
def test_the_curve_is_the_loss_in_the_stated_metric_and_no_other_subspace_has_less(rank):
    writer, inputs, gradients = problem(WIDTH, OUTPUTS)
    bases, curve = principal(writer, inputs, gradients)
    best = curve.loss(rank)
    assert best == pytest.approx(loss_of(bases[:, :, :rank], writer, inputs, gradients))
    for scale in (1.0, 0.1, 0.01):  # far from the best subspace, and beside it
        for _ in range(30):
            other = bases[:, :, :rank] + scale * torch.randn(HEADS, HEAD_DIM, rank, dtype=torch.float64)
            assert loss_of(torch.linalg.qr(other).Q, writer, inputs, gradients) > best


def test_the_output_projection_is_refitted_by_damped_least_squares():
    writer, inputs, gradients = problem(WIDTH, OUTPUTS)
    bases, _ = principal(writer, inputs, gradients)
    block = torch.block_diag(*(basis[:, :4] for basis in bases for _ in range(SHARING)))  # [WIDTH, 6 * 4]
    half = torch.linalg.cholesky(damped(inputs, REPAIR_DAMPING)).T
    expected = torch.linalg.lstsq(half @ block, half @ writer).solution
    fitted = refit(writer, inputs, bases, 4)
    torch.testing.assert_close(fitted, expected)
    worse = fitted + 0.01 * torch.randn_like(fitted)
    assert error(block @ worse - writer, damped(inputs, REPAIR_DAMPING), gradients) > error(
        block @ fitted - writer, damped(inputs, REPAIR_DAMPING), gradients
    )


def test_bases_are_orthonormal_even_if_heads_are_used_in_few_directions():
    writer, inputs, gradients = problem(WIDTH, OUTPUTS)
    writer[:, 3:] = 0
    gradients[3:] = gradients[:, 3:] = 0
    gradients[:3, :3] = second_moment(rows(50, 3))
    bases, curve = principal_values(
        writer[:HEAD_DIM], inputs[:HEAD_DIM, :HEAD_DIM], gradients, heads=1, head_dim=HEAD_DIM, step=1
    )
    torch.testing.assert_close(bases.mT @ bases, torch.eye(HEAD_DIM, dtype=torch.float64)[None])
    assert curve.loss(3) == pytest.approx(0, abs=1e-12)
    assert curve.loss(2) > 1e-6


def test_a_value_bias_moves_into_the_output_bias():
    """The statistics are those of inputs without the bias, the output is the same."""
    samples, bias = rows(60, WIDTH), torch.randn(HEADS * HEAD_DIM, dtype=torch.float64)
    writer, weight = torch.randn(WIDTH, OUTPUTS, dtype=torch.float64), torch.rand(60, dtype=torch.float64)
    spread = bias.view(HEADS, HEAD_DIM).repeat_interleave(SHARING, 0).flatten()

    def weighted(x):
        return WriterStatistics((x.T * weight) @ x, weight @ x, weight.sum().item(), torch.eye(OUTPUTS))

    found, gain = fold_bias(weighted(samples + spread), writer, bias, head_dim=HEAD_DIM)
    torch.testing.assert_close(found.inputs, weighted(samples).inputs)
    torch.testing.assert_close(found.mean, weighted(samples).mean)
    torch.testing.assert_close(samples @ writer + gain, (samples + spread) @ writer)
    assert found.mass == weighted(samples).mass
