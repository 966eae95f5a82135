"""What a config tells of a model."""

import re

import pytest
import torch
from models import tiny_model, tokens
from transformers import BertConfig

from slicegpt_fast import InputError, save_model, slice_model
from slicegpt_fast.evaluation import stored_bytes, stored_parameters
from slicegpt_fast.inspection import describe
from slicegpt_fast.slicing import block_parameters
from slicegpt_fast.tables import decimal


def test_dense(tmp_path):
    model = tiny_model(tied=True, dtype=torch.bfloat16)
    save_model(model, tmp_path / "model")
    facts = describe(str(tmp_path / "model"))
    assert facts == {
        "model type": "llama",
        "dtype": "torch.bfloat16",
        "sliced": "no, but it can be",
        "stored parameters": decimal(stored_parameters(model)),
        "  in decoder blocks": f"{decimal(block_parameters(model))} (1.000 of the dense model's)",
        "bytes": f"{decimal(stored_bytes(model))}B",
    }


@pytest.mark.parametrize(
    ("arguments", "sliced", "kept"),
    [
        ({}, "per-norm basis, raw signal, dense shortcuts", "36 of 48, 48 at the head"),
        (
            dict(basis="shared", signal="normalized"),
            "shared basis, normalized signal, no shortcuts",
            "36 of 48, 36 at the head",
        ),
        (
            dict(shortcut="aligned", shortcut_rank=4, slice_head=True),
            "per-norm basis, raw signal, aligned shortcuts of rank 4 at most",
            "36 of 48, 36 at the head",
        ),
        (
            dict(sparsity=None, widths=[40, 40, 32, 24, 32, 40, 48]),
            "per-norm basis, raw signal, dense shortcuts",
            "24 to 40 of 48, 48 at the head",
        ),
    ],
)
def test_sliced(arguments, sliced, kept, tmp_path):
    dense = tiny_model(tied=True)
    options = dict(sparsity=0.25, round_to=1) | arguments
    model = slice_model(dense, [tokens(4, 32)], progress=False, **options)
    save_model(model, tmp_path / "model")
    facts = describe(str(tmp_path / "model"))
    share = block_parameters(model) / block_parameters(dense)
    assert facts == {
        "model type": "llama",
        "dtype": "torch.float32",
        "sliced": sliced,
        "calibrated on": "128 tokens",
        "directions kept": kept,
        "stored parameters": decimal(stored_parameters(model)),
        "  in decoder blocks": f"{decimal(block_parameters(model))} ({share:.3f} of the dense model's)",
        "bytes": f"{decimal(stored_bytes(model))}B",
    }


@pytest.mark.parametrize(
    ("arguments", "sliced", "kept"),
    [
        (
            dict(cut=("channels", "values"), round_to=8),
            "in its layers; the residual stream is the dense model's",
            r"channels \d+( to \d+)? of 80, values (8|8 to 12) of 12, stream 48 of 48",
        ),
        (
            dict(cut=("channels",), uniform=True),
            "in its layers; the residual stream is the dense model's",
            "channels 32 of 80, stream 48 of 48",
        ),
    ],
)
def test_cut(arguments, sliced, kept, tmp_path):
    dense = tiny_model(tied=True)
    model = slice_model(dense, [tokens(4, 32)], progress=False, target_params=0.7, **arguments)
    save_model(model, tmp_path / "model")
    facts = describe(str(tmp_path / "model"))
    share = block_parameters(model) / block_parameters(dense)
    assert facts.keys() == {
        "model type",
        "dtype",
        "sliced",
        "calibrated on",
        "sizes kept",
        "stored parameters",
        "  in decoder blocks",
        "bytes",
    }
    assert (facts["sliced"], facts["calibrated on"]) == (sliced, "128 tokens")
    assert re.fullmatch(kept, facts["sizes kept"])
    assert facts["stored parameters"] == decimal(stored_parameters(model))
    assert facts["  in decoder blocks"].endswith(f" ({share:.3f} of the dense model's)")


def test_reads_no_weights(tmp_path):
    save_model(tiny_model(), tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    assert describe(str(tmp_path / "model"))["sliced"] == "no, but it can be"


def test_a_family_that_cannot_be_sliced(tmp_path):
    BertConfig(is_decoder=True).save_pretrained(tmp_path)
    facts = describe(str(tmp_path))
    assert facts.keys() == {"model type", "dtype", "sliced"}
    assert facts["sliced"].startswith("no, and it cannot be: model type 'bert' cannot be sliced: ")


@pytest.mark.parametrize(
    "content",
    [
        None,
        "{",
        '{"model_type": "nonsense"}',
        '{"model_type": "clip"}',
        '{"model_type": "llama", "hidden_size": "64"}',
    ],
)
def test_no_model(content, tmp_path):
    if content:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError, match=f"^cannot load {tmp_path}: "):
        describe(str(tmp_path))
