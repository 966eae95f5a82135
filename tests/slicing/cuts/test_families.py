"""Cuts of every family: exact where they delete nothing that matters, and ordinary models afterwards."""

import copy
import json
import pickle

import pytest
import torch
from models import CUTTABLE, FAMILIES, sparse_layers, tiny_model, tokens
from transformers import AutoModelForCausalLM

from slicegpt_fast import InputError, patch_model, patch_report, unpatch_model
from slicegpt_fast.architectures import Decoder, weights
from slicegpt_fast.slicing import SliceOptions, block_parameters, cut_to_budget, slice_config_of
from slicegpt_fast.slicing.cuts.budget import cut_to_sizes
from slicegpt_fast.slicing.cuts.choice import Sizes, choose_sizes
from slicegpt_fast.slicing.cuts.curve import Curve
from slicegpt_fast.slicing.cuts.cutting import cut_model, fit_cuts
from slicegpt_fast.slicing.cuts.narrow import channels_of, narrow_values_
from slicegpt_fast.slicing.cuts.sensitivity import measure_sensitivity
from slicegpt_fast.slicing.layers import empty_copy, narrow_

CALIBRATION = [tokens(4, 32, seed=1), tokens(4, 32, seed=2)]
BATCHES = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in CALIBRATION]
BIASED = ("llama", "qwen2", "qwen3", "phi", "gpt2", "gpt-neox", "opt", "stablelm", "falcon-rw")  # in their values
WIDTHS = {"beside the stream": 48, "with the stream": 40}


def fitted(model):
    """The cuts of a dense model's layers."""
    return fit_cuts(
        Decoder(model), measure_sensitivity(model, BATCHES, progress=False), channels=8, values=4, progress=False
    )


def cut_family(family="llama", width=48, **options):
    """A model whose layers keep uneven sizes: one all of them, the others fewer channels and values of rank 8."""
    model = tiny_model(family, **options)
    first, *others = channels_of(Decoder(model))
    channels = (first, *(size - 16 for size in others))
    sizes = Sizes(width, channels, (8, 12, 8), 1.0, 0.0)
    return cut_to_sizes(Decoder(model), BATCHES, fitted(model), sizes, progress=False)[0]


def branches(model, *, attending):
    decoder = Decoder(model)
    for site, sublayer in decoder.sublayers():
        for branch in sublayer.branches:
            if (branch.activation is None) == attending:
                yield site.index, site.part, branch


@torch.no_grad()
def logits(model, ids, **arguments):
    return model(ids, **arguments).logits


def assert_close(actual, expected, tolerance=1e-5):
    spread = (expected.max() - expected.min()).item()
    assert (actual - expected).abs().max().item() <= tolerance * spread


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", CUTTABLE)
def test_nothing_changes_at_full_size(family, tied):
    model = tiny_model(family, tied=tied)
    before = logits(model, tokens(2, 19))
    cut = cut_model(model, fitted(model), tuple(channels_of(Decoder(model))), (12,) * 3)
    assert torch.equal(logits(cut, tokens(2, 19)), before)
    assert cut.state_dict().keys() == model.state_dict().keys()
    assert (cut.get_output_embeddings().weight is cut.get_input_embeddings().weight) == tied
    with torch.no_grad():
        for parameter in cut.parameters():
            parameter.zero_()
    assert torch.equal(logits(model, tokens(2, 19)), before)


@pytest.mark.parametrize("family", CUTTABLE)
def test_values_of_full_rank_are_exact(family):
    """Rotated and re-fitted at the full rank, their bias in the output projection's, nothing is lost."""
    model = tiny_model(family)
    heads, cuts, cut = Decoder(model).heads, fitted(model), copy.deepcopy(model)
    layers = Decoder(cut).layers
    for index, layer, branch in branches(model, attending=True):
        narrow_values_(layers[index], branch, heads, heads.size)
        cuts[index].values.fill_(layers[index], layer, branch, heads, heads.size)
        biases = [weight.bias for weight in weights(layers[index], branch.readers[-1:])]
        assert weights(layers[index], branch.writers)[0].bias is not None or biases == [None]
    assert_close(logits(cut, tokens(2, 19)), logits(model, tokens(2, 19)))


@pytest.mark.parametrize("family", CUTTABLE)
def test_channels_that_nothing_reads_cost_nothing(family):
    model = tiny_model(family)
    sizes = []
    with torch.no_grad():
        for _, layer, branch in branches(model, attending=False):
            (writer,) = weights(layer, branch.writers)
            full = writer.matrix.shape[-1]
            for matrix in writer.matrix if writer.matrix.ndim == 3 else [writer.matrix]:  # each expert has its own
                matrix[:, torch.randperm(full)[:16]] = 0
            sizes.append(full - 16)
    cuts = fitted(model)
    for cut, size in zip(cuts, sizes, strict=True):
        assert cut.channels.curve.loss(size) <= 1e-9 * cut.channels.curve.losses[-1]
    cut = cut_model(model, cuts, tuple(sizes), ())
    assert channels_of(Decoder(cut)) == sizes
    assert_close(logits(cut, tokens(2, 19)), logits(model, tokens(2, 19)))


@pytest.mark.parametrize("family", CUTTABLE)
def test_dimensions_of_values_that_nothing_reads_cost_nothing(family):
    """The output projection reads 8 directions of each key and value head, not the same in any two."""
    model = tiny_model(family)
    heads = Decoder(model).heads
    with torch.no_grad():
        for _, layer, branch in branches(model, attending=True):
            (writer,) = weights(layer, branch.writers)
            for group in range(heads.values):
                basis = torch.linalg.qr(torch.randn(heads.size, 8)).Q
                columns = heads.columns(group)
                read = writer.matrix[:, columns.start : columns.stop].unflatten(1, (-1, heads.size))
                writer.matrix[:, columns.start : columns.stop] = (read @ basis @ basis.T).flatten(1)
    cuts = fitted(model)
    for cut in cuts:
        assert cut.values.curve.loss(8) <= 1e-9 * cut.values.curve.losses[-1]
    cut = cut_model(model, cuts, (), (8,) * 3)
    for _, layer, branch in branches(cut, attending=True):
        (writer,) = weights(layer, branch.writers)
        assert writer.matrix.shape[1] == heads.queries * 8
        assert (writer.bias is not None) or family not in BIASED
    assert_close(logits(cut, tokens(2, 19)), logits(model, tokens(2, 19)))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
@pytest.mark.parametrize("family", CUTTABLE)
def test_from_pretrained_gives_back_the_same_model(family, width, tied, tmp_path):
    cut = cut_family(family, width, tied=tied)
    cut.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(cut)
    plan = slice_config_of(loaded).plan()
    assert plan == slice_config_of(cut).plan()
    assert (plan.basis, plan.values) == (None if width == 48 else "shared", (8, 12, 8))
    assert loaded.state_dict().keys() == cut.state_dict().keys()
    assert sum(p.numel() for p in loaded.parameters()) == sum(p.numel() for p in cut.parameters())
    ids = tokens(2, 9)
    assert torch.equal(logits(loaded, ids), logits(cut, ids))
    assert torch.equal(logits(copy.deepcopy(loaded), ids), logits(cut, ids))
    assert torch.equal(logits(pickle.loads(pickle.dumps(cut)), ids), logits(cut, ids))
    loaded.save_pretrained(tmp_path / "again")
    first, again = ((tmp_path / name).read_text() for name in ("config.json", "again/config.json"))
    assert json.loads(first) == json.loads(again)


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
@pytest.mark.parametrize("family", CUTTABLE)
def test_patched_and_back_again(family, width, backend):
    cut = cut_family(family, width)
    ids, one = tokens(2, 19, seed=1), tokens(2, 1, seed=2)
    before = logits(cut, ids), logits(cut, one)
    report = patch_report(patch_model(cut, backend=backend))
    assert report.fused == len(report.rows) - sparse_layers(cut), str(report)
    assert_close(logits(cut, ids), before[0])
    assert_close(logits(cut, one), before[1])
    unpatch_model(cut)
    assert torch.equal(logits(cut, ids), before[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["llama", "phi", "gpt2", "phi3"])
def test_16_bit_models_keep_their_dtype(family, dtype):
    model = tiny_model(family, dtype=dtype)
    cuts = fitted(model)
    cut = cut_model(model, cuts, (72,) * 3, (8,) * 3)
    assert {parameter.dtype for parameter in cut.parameters()} == {dtype}
    wide = copy.deepcopy(model).float()
    exact = logits(cut_model(wide, cuts, (72,) * 3, (8,) * 3), tokens(2, 9))
    error = (logits(wide, tokens(2, 9)) - logits(model, tokens(2, 9)).float()).abs().mean()
    assert (logits(cut, tokens(2, 9)).float() - exact).abs().mean() <= 2 * error


@pytest.mark.parametrize("budget", ["params", "bytes", "flops"])
@pytest.mark.parametrize("target", [0.95, 0.8])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_result_stores_no_more_than_the_budget(family, target, budget):
    model = tiny_model(family)
    options = SliceOptions(target_params=target, budget=budget, round_to=8)
    found = cut_to_budget(model, CALIBRATION, options, progress=False)
    dense, stored = (counted(each, budget) for each in (model, found.model))
    assert target - (0.06 if family in CUTTABLE else 0.15) < stored / dense <= target
    assert found.trials[0].sizes.stored == pytest.approx(stored / dense)
    assert found.plan == slice_config_of(found.model).plan()


@pytest.mark.parametrize(("family", "options"), [("qwen2", {}), ("stablelm", {}), ("falcon-rw", {"bias": False})])
def test_biases_that_a_cut_adds_are_within_the_budget(family, options):
    """Where a value bias goes through the output projection, or a norm's into its readers, what had none gets one."""
    model = tiny_model(family, **options)
    decoder, cuts = Decoder(model), fitted(model)
    stream = Curve((48, 40), (0.0, 1e-6))
    for share in torch.linspace(0.7, 0.99, 59).tolist():
        found = choose_sizes(decoder, cuts, stream, share)
        assert {sizes.width for sizes in found} == {48, 40}
        for sizes in found:
            outline = empty_copy(model)
            narrow_(outline, sizes.plan(decoder))
            assert block_parameters(outline) <= share * block_parameters(model)


def counted(model, budget):
    """What the budget counts of the decoder layers."""
    if budget == "params":
        return block_parameters(model)
    parameters = [parameter for layer in Decoder(model).layers for parameter in layer.parameters()]
    if budget == "bytes":
        return sum(parameter.nbytes for parameter in parameters)
    experts = 4 // 2  # of four, a token runs two
    return sum(2 * p.numel() / (experts if p.ndim == 3 else 1) for p in parameters if p.ndim > 1)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "falcon-7b"])
def test_uniform_sizes(family):
    options = SliceOptions(target_params=0.8, uniform=True, round_to=8)
    plan = cut_to_budget(tiny_model(family), CALIBRATION, options, progress=False).plan
    assert len(set(plan.channels)) == len(set(plan.values)) == 1
    assert plan.channels[0] < max(channels_of(Decoder(tiny_model(family))))


def test_layers_that_differ_have_no_uniform_size():
    options = SliceOptions(target_params=0.8, uniform=True)
    with pytest.raises(InputError, match=r"uniform=True gives .* theirs differ \(channels: 40, 80\): leave it out"):
        cut_to_budget(tiny_model("qwen3-moe"), CALIBRATION, options, progress=False)
