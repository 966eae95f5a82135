"""The correction of writers: the equations that it solves, read off the finished model."""

import copy

import pytest
import torch
from models import tiny_model, tokens

from slicegpt_fast.architectures import Decoder, weights
from slicegpt_fast.slicing.cuts.correction import DAMPING, correct_

IDS = [tokens(3, 24, seed=1), tokens(2, 30, seed=2)]
MASKS = [torch.ones_like(ids) for ids in IDS]
MASKS[1][0, :7] = 0
BATCHES = [{"input_ids": ids, "attention_mask": mask} for ids, mask in zip(IDS, MASKS, strict=True)]


def damaged(model):
    """A copy with other writers in its first layer."""
    copied = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(3)
    for sublayer in Decoder(copied).architecture.sublayers:
        for branch in sublayer.branches:
            for writer in weights(Decoder(copied).layers[0], branch.writers):
                writer.matrix = writer.matrix * (1 + 0.2 * torch.randn(writer.matrix.shape, generator=generator))
    return copied


@torch.no_grad()
def observed(model):
    """What a model's own forward makes of the text: writers' inputs by their parameter, and streams behind layers."""
    inputs, streams, handles = {}, [], []
    decoder = Decoder(model)
    for layer in decoder.layers:
        handles.append(layer.register_forward_hook(lambda m, a, output: streams[-1].append(_first(output))))
    for site, sublayer in decoder.sublayers():
        for branch in sublayer.branches:
            for writer in weights(site.part, branch.writers):
                rows = inputs.setdefault((site.index, branch.writers[0]), [])
                handles.append(writer.owner.register_forward_hook(lambda m, a, o, rows=rows: rows.append(a[0])))
    for batch in BATCHES:
        streams.append([])
        positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        model(**batch, position_ids=positions, use_cache=False)
    for handle in handles:
        handle.remove()
    return inputs, streams


def _first(output):
    return output[0] if isinstance(output, tuple) else output


def counted(tensors):
    return torch.cat([each[mask.bool()] for each, mask in zip(tensors, MASKS, strict=True)]).double()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt-neox"])
def test_each_change_is_the_damped_least_squares_solution_for_the_errors_left(family):
    """At the minimum sum x e^T = damping meandiag(sum x x^T) Delta, e what is left of the error behind the sublayer.

    A family whose branches run in parallel has its two writers fitted together.
    """
    model = tiny_model(family)
    before = damaged(model)
    after = copy.deepcopy(before)
    correct_(after, model, BATCHES, progress=False)
    (inputs, streams), (_, expected) = observed(after), observed(model)
    old, new = Decoder(before), Decoder(after)
    for index in range(3):
        error = counted([e[index] - s[index] for e, s in zip(expected, streams, strict=True)])
        if new.architecture.centered:
            error = error - error.mean(-1, keepdim=True)
        branches = new.architecture.sublayers[-1].branches
        x = torch.cat([counted(inputs[index, branch.writers[0]]) for branch in branches], -1)
        change = torch.cat(
            [
                (b.matrix - a.matrix).double()
                for branch in branches
                for a, b in zip(*(weights(d.layers[index], branch.writers) for d in (old, new)), strict=True)
            ],
            -1,
        )
        assert change.abs().max() > 1e-3
        expected_change = x.T @ error / (DAMPING * x.square().sum(0).mean())
        torch.testing.assert_close(change.T, expected_change, rtol=1e-3, atol=1e-3 * change.abs().max().item())


def test_nothing_changes_without_an_error():
    model = tiny_model("llama")
    same = copy.deepcopy(model)
    correct_(same, model, BATCHES, progress=False)
    for name, parameter in model.named_parameters():
        assert torch.equal(same.get_parameter(name), parameter)
        assert same.get_parameter(name).requires_grad


def test_experts_stay_and_what_attends_beside_them_is_corrected():
    model = tiny_model("mixtral")
    before = damaged(model)
    after = copy.deepcopy(before)
    correct_(after, model, BATCHES, progress=False)
    changed = {name for name, each in before.named_parameters() if not torch.equal(after.get_parameter(name), each)}
    assert changed == {f"model.layers.{index}.self_attn.o_proj.weight" for index in range(3)}
