"""Models of 8 and 4 bits: what is rounded and how well, saved and loaded, trained, patched, and undone."""

import copy
import json

import pytest
import torch
from models import CUTTABLE, FAMILIES, VOCABULARY, tiny_model, tokens
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from slicegpt_fast import (
    InputError,
    dequantize_model,
    export_plain,
    patch_model,
    perplexity,
    quantize_model,
    slice_model,
    unpatch_model,
)
from slicegpt_fast.architectures import Decoder
from slicegpt_fast.quantization import QuantizedLinear

CALIBRATION = [tokens(4, 32, seed=1), tokens(4, 32, seed=2)]
IDS = tokens(2, 19)
PLANS = {
    "dense": {},
    "shared": dict(basis="shared", sparsity=0.2),
    "per-norm": dict(basis="per-norm", sparsity=0.2),
    "cut": dict(target_params=0.8, round_to=8),
}


def model_of(family="llama", plan="dense", **options):
    model = tiny_model(family, **options)
    return slice_model(model, CALIBRATION, **PLANS[plan], progress=False) if PLANS[plan] else model


def quantised(model, bits=8, **options):
    return quantize_model(model, bits, progress=False, **options)


@torch.no_grad()
def logits(model, ids=IDS):
    return model(ids).logits


def error(model, exact):
    """The relative root mean square difference of the logits."""
    expected = logits(exact)
    return ((logits(model) - expected).square().mean().sqrt() / expected.std()).item()


@pytest.mark.parametrize("family", FAMILIES)
def test_eight_bits_are_close_in_every_family(family):
    model = model_of(family)
    before = copy.deepcopy(model.state_dict())
    made = quantised(model, calibration=CALIBRATION)
    assert type(made) is type(model)
    assert error(made, model) < 0.2
    layers = [m for layer in Decoder(made).layers for m in layer.modules() if isinstance(m, QuantizedLinear)]
    assert len(layers) >= 6
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    ("family", "plan"),
    [(family, plan) for family in ("llama", "gpt2", "opt", "mixtral") for plan in ("dense", "shared", "cut")],
)
def test_dequantised_it_computes_the_same(family, plan, bits):
    model = model_of(family, plan, tied=family != "opt")
    made = quantised(model, bits)
    expected = logits(made)
    assert dequantize_model(made) is made
    torch.testing.assert_close(logits(made), expected)
    assert {type(m) for m in made.modules()} == {type(m) for m in model.modules()}
    with pytest.raises(InputError, match="nothing to dequantise"):
        dequantize_model(made)


@pytest.mark.parametrize("group", [32, 64, 128])
def test_feedback_is_better_than_nearest(group):
    """On the calibration text, at four bits."""
    model = model_of("qwen2", hidden_size=96, intermediate_size=160, head_dim=24)
    nearest, gptq = (
        error(quantised(model, 4, group=group, calibration=CALIBRATION, method=method, tables=16), model)
        for method in ("nearest", "gptq")
    )
    assert gptq < nearest


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_saved_and_loaded(plan, bits, tied, dtype, tmp_path):
    made = quantised(model_of("llama", plan, tied=tied, dtype=dtype), bits, calibration=CALIBRATION)
    made.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.dtype == made.dtype == dtype
    assert loaded.state_dict().keys() == made.state_dict().keys()
    assert torch.equal(logits(loaded), logits(made))
    assert torch.equal(logits(copy.deepcopy(loaded)), logits(made))
    loaded.save_pretrained(tmp_path / "again")
    first, again = (load_file(folder / "model.safetensors") for folder in (tmp_path, tmp_path / "again"))
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.slow
@pytest.mark.parametrize("family", CUTTABLE)
def test_every_family_is_saved_and_loaded(family, tmp_path):
    made = quantised(model_of(family, "cut", tied=True), 4)
    made.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(made))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("family", ["llama", "qwen3", "opt"])
def test_patched_and_back_again(family, plan, bits):
    model = quantised(model_of(family, plan), bits)
    before = logits(model)
    one = logits(model, IDS[:, :1])
    patch_model(model)
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(model, IDS[:, :1]), one, rtol=1e-4, atol=1e-4)
    unpatch_model(model)
    assert torch.equal(logits(model), before)


def test_adapters_train():
    model = quantised(model_of(plan="cut"), 4)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights="gaussian"))
    adapted(IDS, labels=IDS).loss.backward()
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    assert trained
    assert all(parameter.grad is not None for parameter in trained)
    assert all("lora" in name for name, parameter in adapted.named_parameters() if parameter.requires_grad)


def test_perplexity_and_generation():
    model = quantised(model_of(plan="shared"), 8)
    assert perplexity(model, [IDS]) > 1
    assert model.generate(IDS, max_new_tokens=4, do_sample=False).shape == (2, 23)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(bits=5), "bits"),
        (dict(bits=4, group=16), "group"),
        (dict(bits=8, group=32), "group"),
        (dict(bits=8, method="gptq"), "rounds to calibration text"),
        (dict(bits=8, method="best"), "method"),
        (dict(bits=8, tables=4), "tables"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(InputError, match=message):
        quantize_model(model_of(), **options)


def test_what_cannot_be_quantised(tmp_path):
    made = quantised(model_of())
    with pytest.raises(InputError, match="quantised already"):
        quantised(made)
    with pytest.raises(InputError, match="quantised"):
        export_plain(quantised(model_of(plan="shared")), tmp_path / "plain")


@pytest.mark.parametrize("change", ["short", "missing", "group"])
def test_a_folder_that_was_changed(change, tmp_path):
    quantised(model_of(tied=False), 4, group=32).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = next(name for name in tensors if "q_proj" in name and name.endswith("scales"))
    if change == "short":
        tensors[name] = tensors[name][:, :-1].contiguous()
    elif change == "missing":
        del tensors[name]
    else:
        config = json.loads((tmp_path / "config.json").read_text())
        config["quantization_config"]["precision"]["group"] = 128
        (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_it_stores_what_it_says():
    made = quantised(model_of(), 4, group=32, tables=16)
    linear = Decoder(made).layers[0].mlp.down_proj
    assert linear.weight.shape == (48, 40)
    assert linear.scales.shape == (48, 3)
    assert linear.scales.dtype == torch.float16
    assert made.get_input_embeddings().weight.shape == (VOCABULARY, 48)
