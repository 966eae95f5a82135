"""Channels: elimination against brute force, the repair against least squares on raw rows."""

from itertools import combinations

import pytest
import torch
from slicing.cuts.problems import error, problem, rows, second_moment

from slicegpt_fast.slicing.cuts.channels import DAMPING, REPAIR_DAMPING, damped, eliminate, repair, root, survivors


def least_error(writer, inputs, gradients, kept) -> float:
    """The damped error with only the rows ``kept``, re-fitted, from the normal equations alone."""
    metric = damped(inputs, DAMPING)
    fitted = torch.zeros_like(writer)
    fitted[kept] = torch.linalg.lstsq(metric[kept][:, kept], (metric @ writer)[kept]).solution
    return error(fitted - writer, metric, gradients)


@pytest.mark.parametrize("step", [1, 3, 4])
def test_the_curve_is_the_error_of_the_best_refit_of_the_survivors(step):
    writer, inputs, gradients = problem(14, 9)
    order, curve = eliminate(writer, inputs, gradients, step=step)
    assert sorted(order.tolist()) == list(range(14))
    assert curve.sizes == (14, *range(13 // step * step, 0, -step))
    for size, loss in zip(curve.sizes, curve.losses, strict=True):
        kept = survivors(order, size)
        assert kept.tolist() == sorted(order[14 - size :].tolist())
        assert loss == pytest.approx(least_error(writer, inputs, gradients, kept), rel=1e-8, abs=1e-12)


def test_each_step_takes_the_channel_that_costs_least():
    writer, inputs, gradients = problem(10, 6)
    order, curve = eliminate(writer, inputs, gradients, step=1)
    left = list(range(10))
    for channel, loss in zip(order[:-1].tolist(), curve.losses[1:], strict=True):
        costs = {j: least_error(writer, inputs, gradients, [k for k in left if k != j]) for j in left}
        assert costs[channel] == pytest.approx(min(costs.values()), rel=1e-8)
        assert loss == pytest.approx(costs[channel], rel=1e-8)
        left.remove(channel)
    assert order[-1].item() == left[0]


def test_elimination_is_close_to_the_best_of_all_choices():
    writer, inputs, gradients = problem(11, 6)
    _, curve = eliminate(writer, inputs, gradients, step=1)
    choices = [least_error(writer, inputs, gradients, list(kept)) for kept in combinations(range(11), 6)]
    assert min(choices) <= curve.loss(6) * (1 + 1e-9)
    assert sum(choice < curve.loss(6) * (1 - 1e-9) for choice in choices) <= 4  # of 462


def test_a_useless_channel_goes_first():
    writer, inputs, gradients = problem(12, 6)
    writer[4] = 0
    inputs[4] = inputs[:, 4] = 0
    order, curve = eliminate(writer, inputs, gradients, step=1)
    assert order[0].item() == 4
    assert curve.losses[1] == pytest.approx(0, abs=1e-12)
    assert curve.losses[2] > 1e-6


def test_the_repair_is_the_damped_least_squares_solution_on_raw_rows():
    writer, samples = torch.randn(12, 7, dtype=torch.float64), rows(150, 12)
    inputs, kept = second_moment(samples), torch.tensor([0, 3, 4, 8, 11])
    ridge = (REPAIR_DAMPING * inputs.diagonal().mean()).sqrt() * torch.eye(12, dtype=torch.float64)
    everything = torch.cat([samples / len(samples) ** 0.5, ridge])  # rows that pull each weight to the dense one's
    expected = torch.linalg.lstsq(everything[:, kept], everything @ writer).solution
    torch.testing.assert_close(repair(writer, inputs, kept), expected)


def test_full_size_is_exact():
    writer, inputs, _ = problem(12, 7)
    torch.testing.assert_close(repair(writer, inputs, torch.arange(12)), writer)


def test_an_expert_without_tokens_is_cut_without_a_repair():
    writer = torch.randn(8, 5, dtype=torch.float64)
    nothing = torch.zeros(8, 8, dtype=torch.float64), torch.zeros(5, 5, dtype=torch.float64)
    order, curve = eliminate(writer, *nothing, step=4)
    assert sorted(order.tolist()) == list(range(8))
    assert curve.losses == (0, 0)
    kept = survivors(order, 4)
    assert torch.equal(repair(writer, nothing[0], kept), writer[kept])


def test_weights_of_any_dtype_are_solved_in_fp64():
    writer, inputs, gradients = problem(12, 7)
    low = writer.bfloat16()
    expected = eliminate(low.double(), inputs, gradients, step=4)
    order, curve = eliminate(low, inputs, gradients, step=4)
    assert torch.equal(order, expected[0])
    assert curve == expected[1]


def test_the_root_of_a_singular_matrix():
    tall = torch.randn(9, 4, dtype=torch.float64)
    torch.testing.assert_close(root(tall @ tall.T) @ root(tall @ tall.T).T, tall @ tall.T)
