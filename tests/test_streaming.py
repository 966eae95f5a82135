"""Slicing from file to file gives the weights of slicing in memory, in less memory, and survives being killed."""

import json
import os
import shutil

import pytest
import torch
from models import FAMILIES, tiny_model, tokens
from safetensors.torch import load_file

from slicegpt_fast import InputError, load_model, save_model, slice_model
from slicegpt_fast.streaming import slice_checkpoint

PADDED = {"input_ids": tokens(2, 20, seed=1), "attention_mask": torch.ones(2, 20, dtype=torch.long)}
PADDED["attention_mask"][0, :7] = 0
CALIBRATION = [tokens(2, 32), PADDED, tokens(1, 32, seed=2)]


def checkpoint(folder, model, shard_size="60KB"):
    """``model`` in several files."""
    model.save_pretrained(folder, max_shard_size=shard_size)
    return folder


def stored(folder):
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def assert_same(left, right):
    """The same tensors to the bit, and the same configs."""
    left_weights, right_weights = stored(left), stored(right)
    assert left_weights.keys() == right_weights.keys()
    for name, tensor in left_weights.items():
        assert tensor.dtype == right_weights[name].dtype
        assert torch.equal(tensor, right_weights[name]), name
    for config in ("config.json", "generation_config.json"):
        assert json.loads((left / config).read_text()) == json.loads((right / config).read_text())


PLANS = {
    "per-norm": dict(sparsity=0.25),
    "shared": dict(sparsity=0.25, basis="shared", signal="normalized"),
    "groups, re-fitted": dict(sparsity=0.25, basis=3, refit=True),
    "aligned, re-fitted": dict(target_params=0.85, shortcut="aligned", refit=True),
    "groups, aligned, truncated, head": dict(
        sparsity=0.25, basis=2, shortcut="aligned", shortcut_rank=3, slice_head=True
    ),
    "variance": dict(target_params=0.85, schedule="variance", round_to=1),
    "widths": dict(widths=[40, 40, 32, 32, 24, 24, 48]),
}


@pytest.mark.parametrize("activations", ["memory", "disk"])
@pytest.mark.parametrize("plan", PLANS)
def test_every_plan_gives_the_weights_of_slicing_in_memory(plan, activations, tmp_path):
    source = checkpoint(tmp_path / "dense", tiny_model())
    save_model(slice_model(load_model(source), CALIBRATION, progress=False, **PLANS[plan]), tmp_path / "expected")
    slice_checkpoint(source, tmp_path / "out", CALIBRATION, activations=activations, progress=False, **PLANS[plan])
    assert_same(tmp_path / "out", tmp_path / "expected")
    assert sorted(os.listdir(tmp_path)) == ["dense", "expected", "out"]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family, tmp_path):
    source = checkpoint(tmp_path / "dense", tiny_model(family))
    arguments = dict(sparsity=0.25, slice_head=True, refit=True, progress=False)
    save_model(slice_model(load_model(source), CALIBRATION, **arguments), tmp_path / "expected")
    slice_checkpoint(source, tmp_path / "out", CALIBRATION, activations="disk", **arguments)
    assert_same(tmp_path / "out", tmp_path / "expected")
    ids = tokens(1, 9)
    assert torch.equal(load_model(tmp_path / "out")(ids).logits, load_model(tmp_path / "expected")(ids).logits)
