"""Basis groups, aligned shortcuts, per-site sizes, re-fitted readers."""

import copy
import gc
import weakref

import pytest
import torch
from models import FAMILIES, tiny_model, tokens
from ops.accuracy import other_defaults

from slicegpt_fast import InputError, slice_model
from slicegpt_fast.architectures import Decoder
from slicegpt_fast.slicing import SliceOptions, align, apply_bases, block_parameters, find_bases, fit_bases, make_plan
from slicegpt_fast.slicing.layers import AlignedShortcut
from slicegpt_fast.slicing.plan import parameter_counter

CALIBRATION = [tokens(4, 32, seed=1)]


def sliced_by(model, **arguments):
    return slice_model(model, CALIBRATION, progress=False, **arguments)


def spread(logits):
    return (logits.max() - logits.min()).item()


@pytest.mark.parametrize("slice_head", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_aligned_shortcuts_are_the_dense_ones(family, slice_head):
    model = tiny_model(family)
    slice_head |= Decoder(model).architecture.keeps_width
    ids = tokens(2, 19)
    dense = sliced_by(model, sparsity=0.25, slice_head=slice_head)(ids).logits
    aligned = sliced_by(model, sparsity=0.25, slice_head=slice_head, shortcut="aligned")(ids).logits
    assert (aligned - dense).abs().max() <= 2e-5 * spread(dense)


@torch.no_grad()
def test_aligned_shortcuts_are_the_identity_minus_a_low_rank():
    model = tiny_model()
    plan = make_plan(model, SliceOptions(sparsity=0.25, shortcut="aligned"))
    bases = align(find_bases(model, CALIBRATION, plan, progress=False))
    sliced = apply_bases(model, bases, progress=False)
    kept = torch.eye(32, dtype=torch.float64)
    for index, layer in enumerate(sliced.model.layers):
        for offset, shortcut in enumerate((layer.attention_shortcut, layer.feedforward_shortcut)):
            here, following = bases.matrices[2 * index + offset : 2 * index + offset + 2]
            torch.testing.assert_close(following.T @ following, torch.eye(following.shape[1], dtype=torch.float64))
            product = here.T @ following
            assert isinstance(shortcut, AlignedShortcut)
            torch.testing.assert_close(shortcut(kept.float()).double(), product, rtol=1e-5, atol=1e-5)
            if following.shape[1] == 32:
                assert torch.linalg.matrix_rank(kept - product, atol=1e-9) <= 48 - 32
                assert shortcut.down.weight.shape == (16, 32)
            else:  # into the unsliced head: exactly the identity, padded
                torch.testing.assert_close(product, torch.eye(32, 48, dtype=torch.float64))
                assert list(shortcut.parameters()) == []


def test_defaults_of_torch_play_no_part():
    model = tiny_model()
    arguments = dict(target_params=0.85, shortcut="aligned", schedule="variance", refit=True)
    expected = sliced_by(model, **arguments).state_dict()
    with other_defaults():
        sliced = sliced_by(model, **arguments).state_dict()
    assert all(torch.equal(sliced[name], expected[name]) for name in expected)


@torch.no_grad()
def test_truncation_keeps_the_largest_part():
    model = tiny_model()
    ids = tokens(2, 19)
    exact = sliced_by(model, sparsity=0.25, shortcut="aligned")(ids).logits
    errors = []
    for rank in (0, 4, 8, 16, 99):
        truncated = sliced_by(model, sparsity=0.25, shortcut="aligned", shortcut_rank=rank)
        shortcut = truncated.model.layers[1].attention_shortcut
        assert (shortcut.down is None) == (rank == 0)
        errors.append((truncated(ids).logits - exact).square().mean().sqrt().item())
    assert errors[3] == errors[4] == 0
    assert errors[0] > errors[1] > errors[2] > 0


@pytest.mark.parametrize("slice_head", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 3, 6])
@pytest.mark.parametrize("shortcut", ["dense", "aligned"])
@torch.no_grad()
def test_groups_of_consecutive_sites(groups, slice_head, shortcut):
    model = tiny_model()
    ids = tokens(2, 19)
    expected = model(ids).logits
    whole = sliced_by(model, sparsity=0, basis=groups, slice_head=slice_head, shortcut=shortcut)
    assert (whole(ids).logits - expected).abs().max() <= 1e-5 * spread(expected)
    plan = make_plan(model, SliceOptions(sparsity=0.25, basis=groups, slice_head=slice_head, shortcut=shortcut))
    assert len(set(plan.groups)) == groups + (not slice_head)
    assert list(plan.groups) == sorted(plan.groups)
    sliced = sliced_by(model, sparsity=0.25, basis=groups, slice_head=slice_head, shortcut=shortcut)
    shortcuts = [name for name, _ in sliced.named_modules() if name.endswith("_shortcut")]
    assert len(shortcuts) == len(set(plan.groups)) - 1


def test_as_many_groups_as_sites_is_per_norm():
    model = tiny_model()
    six, per_norm = (make_plan(model, SliceOptions(sparsity=0.25, basis=basis)) for basis in (6, "per-norm"))
    assert six.groups == per_norm.groups


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "arguments",
    [
        {"basis": 2},
        {"shortcut": "aligned"},
        {"shortcut": "aligned", "shortcut_rank": 5},
        {"basis": "shared", "shortcut": "aligned"},
    ],
)
def test_planned_parameters_are_the_stored_ones(family, arguments):
    model = tiny_model(family)
    bases = fit_bases(model, CALIBRATION, SliceOptions(sparsity=0.25, slice_head=True, **arguments), progress=False)
    count = parameter_counter(Decoder(model))
    assert count(bases.plan) == block_parameters(apply_bases(model, bases, progress=False))


@torch.no_grad()
def test_sizes_per_site():
    model = tiny_model()
    widths = (40, 24, 32, 32, 16, 48, 48)
    for shortcut in ("dense", "aligned"):
        sliced = sliced_by(model, widths=widths, shortcut=shortcut)
        layers = sliced.model.layers
        assert [layer.self_attn.q_proj.in_features for layer in layers] == [40, 32, 16]
        assert [layer.mlp.up_proj.in_features for layer in layers] == [24, 32, 48]
        assert sliced(tokens(1, 5)).logits.isfinite().all()
    dense = sliced_by(model, widths=widths)(tokens(2, 9)).logits
    aligned = sliced_by(model, widths=widths, shortcut="aligned")(tokens(2, 9)).logits
    assert (aligned - dense).abs().max() <= 2e-5 * spread(dense)


@pytest.mark.parametrize("widths", [(32,) * 6, (32,) * 8, (0,) * 7, (64,) * 7, (32.0,) * 7])
def test_sizes_that_do_not_fit(widths):
    with pytest.raises(InputError, match="does not fit a model of 7 norm sites and hidden size 48"):
        make_plan(tiny_model(), SliceOptions(widths=widths))


def test_variance_schedule_spends_the_budget_evenly():
    model = tiny_model()
    options = SliceOptions(target_params=0.8, schedule="variance", round_to=1)
    bases = fit_bases(model, CALIBRATION, options, progress=False)
    count = parameter_counter(Decoder(model))
    assert 0.75 * block_parameters(model) < count(bases.plan) <= 0.8 * block_parameters(model)
    assert len(set(bases.plan.widths)) > 2
    assert bases.plan.widths[-1] == 48
    whole = find_bases(model, CALIBRATION, make_plan(model, SliceOptions(sparsity=0)), progress=False).spectra
    explained = whole.cumsum(1) / whole.sum(1, keepdim=True)
    shares = [explained[site, width - 1].item() for site, width in enumerate(bases.plan.widths[:-1])]
    without_last = [explained[site, width - 2].item() for site, width in enumerate(bases.plan.widths[:-1])]
    assert max(without_last) < min(shares)  # one threshold separates kept from deleted everywhere


@torch.no_grad()
def test_refit_brings_the_sliced_model_closer_on_text_it_has_not_seen():
    model = tiny_model("qwen2")
    calibration = [tokens(32, 32, seed=seed) for seed in range(4)]
    ids = tokens(16, 32, seed=9)
    expected = model(ids).logits
    for basis in ("shared", "per-norm"):
        error = {}
        for refit in (False, True):
            sliced = slice_model(
                model, calibration, sparsity=0.25, basis=basis, signal="normalized", refit=refit, progress=False
            )
            error[refit] = (sliced(ids).logits - expected).square().mean().item()
        assert error[True] < error[False]


@pytest.mark.parametrize("shortcut", ["dense", "aligned"])
@pytest.mark.parametrize("basis", ["shared", "per-norm"])
@pytest.mark.parametrize("family", ["llama", "opt", "phi", "gpt-neox"])
@torch.no_grad()
def test_refit_without_a_slice_changes_nothing(family, basis, shortcut):
    model = tiny_model(family)
    ids = tokens(2, 19)
    expected = model(ids).logits
    sliced = sliced_by(model, sparsity=0, basis=basis, shortcut=shortcut, refit=True)
    assert (sliced(ids).logits - expected).abs().max() <= 1e-4 * spread(expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": 0.2, "basis": 0}, "basis must be 'per-norm', 'shared' or a number of groups from 1 to 6, not 0"),
        ({"sparsity": 0.2, "basis": 7}, "a number of groups from 1 to 6, not 7"),
        ({"sparsity": 0.2, "basis": True}, "a number of groups from 1 to 6, not True"),
        ({"sparsity": 0.2, "shortcut": "sparse"}, "shortcut must be one of 'dense', 'aligned', not 'sparse'"),
        (
            {"sparsity": 0.2, "shortcut_rank": 3},
            "shortcut_rank truncates shortcut='aligned' to a rank of 0 or more, not 3",
        ),
        ({"sparsity": 0.2, "shortcut": "aligned", "shortcut_rank": -1}, "a rank of 0 or more, not -1"),
        ({"sparsity": 0.2, "schedule": "linear"}, "schedule must be one of 'uniform', 'variance', not 'linear'"),
        ({"sparsity": 0.2, "schedule": "variance"}, "schedule='variance' spends a budget: give target_params"),
        (
            {"target_params": 0.1, "schedule": "variance"},
            r"target_params 0\.1 cannot be met by any share of the variance",
        ),
        ({"sparsity": 0.2, "round_to": "tile"}, "round_to must be 'auto' or a whole number of at least 1, not 'tile'"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(InputError, match=message):
        sliced_by(tiny_model(), **arguments)


def test_round_to_auto_suits_the_device():
    assert make_plan(tiny_model(), SliceOptions(sparsity=0.25, round_to="auto")).widths[0] == 32


def test_a_model_sliced_in_inference_mode_can_be_trained():
    with torch.inference_mode():
        sliced = sliced_by(tiny_model(), sparsity=0.25, shortcut="aligned", refit=True)
    sliced(tokens(1, 9)).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in sliced.parameters())


def test_a_sliced_model_is_freed_with_its_last_reference():
    sliced = sliced_by(tiny_model(), sparsity=0.25)
    layer = weakref.ref(sliced.model.layers[0])
    gc.disable()
    try:
        del sliced
        assert layer() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("family", ["llama", "gpt-neox"])
def test_copies_and_pickles_are_of_the_same_classes(family, tmp_path):
    sliced = sliced_by(tiny_model(family), sparsity=0.25)
    torch.save(sliced, tmp_path / "model.pt")
    for again in (copy.deepcopy(sliced), torch.load(tmp_path / "model.pt", weights_only=False)):
        assert [type(module) for module in again.modules()] == [type(module) for module in sliced.modules()]
        with torch.no_grad():
            assert torch.equal(again(tokens(1, 9)).logits, sliced(tokens(1, 9)).logits)


def test_layers_with_shortcuts_are_still_of_their_family():
    model = tiny_model()
    kind = type(model.model.layers[0])
    for layer in sliced_by(model, sparsity=0.25).model.layers:
        assert isinstance(layer, kind)
        assert type(layer).__name__ == kind.__name__
    assert {type(layer) for layer in sliced_by(model, sparsity=0.25, basis="shared").model.layers} == {kind}
    assert {type(layer) for layer in model.model.layers} == {kind}
