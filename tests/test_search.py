"""Trying plans within a budget."""

import gc
import math
import weakref

import pytest
from models import tiny_model, tokens

from slicegpt_fast import InputError, slice_model
from slicegpt_fast.evaluation import perplexity
from slicegpt_fast.search import plans, try_plans
from slicegpt_fast.slicing import apply_bases, block_parameters

CALIBRATION, HELD_OUT = [tokens(4, 32, seed=1)], [tokens(4, 32, seed=2)]


@pytest.mark.parametrize("family", ["llama", "opt", "mixtral"])
def test_every_plan_is_measured_as_it_would_be_sliced(family):
    model = tiny_model(family)
    trials = try_plans(model, CALIBRATION, HELD_OUT, 0.85, progress=False)
    assert {trial.name for trial in trials} == set(plans(model, 0.85))
    assert [trial.perplexity for trial in trials] == sorted(trial.perplexity for trial in trials)
    for trial in (trials[0], trials[-1]):
        sliced = slice_model(model, CALIBRATION, progress=False, **trial.options.arguments())
        assert block_parameters(sliced) / block_parameters(model) == trial.stored <= 0.85
        assert perplexity(sliced, HELD_OUT) == pytest.approx(trial.perplexity, rel=1e-4)


def test_one_sliced_model_at_a_time(monkeypatch):
    made = []

    def apply_alone(*arguments, **options):
        assert not [each for each in made if each() is not None]
        sliced = apply_bases(*arguments, **options)
        made.append(weakref.ref(sliced))
        return sliced

    monkeypatch.setattr("slicegpt_fast.search.apply_bases", apply_alone)
    gc.disable()
    try:
        try_plans(tiny_model(), CALIBRATION, HELD_OUT, 0.85, progress=False)
    finally:
        gc.enable()
    assert len(made) == len(plans(tiny_model(), 0.85))


def test_plans_whose_perplexity_is_nan_come_last(monkeypatch):
    values = iter([5.0, math.nan, 3.0, math.nan, 4.0, 6.0])
    monkeypatch.setattr("slicegpt_fast.search.perplexity", lambda *_: next(values))
    trials = try_plans(tiny_model(), CALIBRATION, HELD_OUT, 0.85, progress=False)
    assert [trial.perplexity for trial in trials[:4]] == [3.0, 4.0, 5.0, 6.0]


def test_sizes_are_multiples_of_round_to():
    trials = try_plans(tiny_model(), CALIBRATION, HELD_OUT, 0.85, round_to=5, progress=False)
    assert all(trial.width % 5 == 0 and trial.options.round_to == 5 for trial in trials)


def test_plans_that_cannot_meet_the_budget_are_left_out():
    model = tiny_model()
    trials = try_plans(model, CALIBRATION, HELD_OUT, 0.2, progress=False)
    assert 0 < len(trials) < len(plans(model, 0.2))


def test_a_budget_that_no_plan_meets():
    with pytest.raises(InputError, match=r"target_params 0\.01 cannot be met"):
        try_plans(tiny_model(), CALIBRATION, HELD_OUT, 0.01, progress=False)
