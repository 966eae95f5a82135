"""A sliced model is an ordinary Hugging Face model: it saves, loads, generates, trains, copies and casts like one."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import FAMILIES, tiny_model, tokens
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from slicegpt_fast import InputError, slice_model
from slicegpt_fast.architectures import Decoder
from slicegpt_fast.slicing import slice_config_of


def sliced_model(family="llama", basis="per-norm", **options):
    model = tiny_model(family, **options)
    slice_head = Decoder(model).architecture.keeps_width
    return slice_model(model, [tokens(4, 32)], sparsity=0.25, basis=basis, slice_head=slice_head, progress=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("basis", ["per-norm", "shared"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_from_pretrained_gives_back_the_same_model(family, basis, dtype, tmp_path):
    sliced = sliced_model(family, basis, tied=True, dtype=dtype)
    sliced.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(sliced)
    assert loaded.dtype == dtype
    assert slice_config_of(loaded).plan() == slice_config_of(sliced).plan()
    assert torch.equal(loaded(tokens(2, 9)).logits, sliced(tokens(2, 9)).logits)
    assert loaded.state_dict().keys() == sliced.state_dict().keys()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    loaded.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again/config.json").read_text()) == json.loads(
        (tmp_path / "config.json").read_text()
    )


@torch.no_grad()
def test_a_folder_that_an_earlier_version_saved():
    """Version 0.1.0 wrote it in bf16, and these logits from it in fp32: a format must be read for ever."""
    data = Path(__file__).parents[1] / "data"
    loaded = AutoModelForCausalLM.from_pretrained(data / "sliced-llama")
    plan = slice_config_of(loaded).plan()
    assert plan.widths == (32, 32, 32, 32, 48)
    assert plan.groups == (0, 1, 2, 3, 4)
    assert (plan.basis, plan.signal, plan.shortcut, plan.shortcut_rank) == ("per-norm", "normalized", "aligned", 6)
    expected = load_file(data / "sliced-llama-logits.safetensors")
    logits = loaded.float()(expected["input_ids"]).logits
    torch.testing.assert_close(logits, expected["logits"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "imports",
    [
        "import slicegpt_fast; from transformers import AutoModelForCausalLM",
        "from transformers import AutoModelForCausalLM; import slicegpt_fast",
        "from slicegpt_fast.errors import InputError; from transformers import AutoModelForCausalLM",
    ],
)
def test_the_format_is_registered_in_whichever_order_things_are_imported(imports):
    folder = Path(__file__).parents[1] / "data" / "sliced-llama"
    program = (
        f"{imports}; import sys;"
        "print(AutoModelForCausalLM.from_pretrained(sys.argv[1]).model.layers[0].mlp.up_proj.in_features)"
    )
    run = subprocess.run([sys.executable, "-c", program, folder], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["32"]


@torch.no_grad()
def test_sharded_checkpoint(tmp_path):
    sliced = sliced_model()
    sliced.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(tokens(2, 9)).logits, sliced(tokens(2, 9)).logits)


def test_a_fresh_process_loads_it_after_the_import(tmp_path):
    sliced = sliced_model()
    sliced.save_pretrained(tmp_path)
    program = (
        "import sys, torch, slicegpt_fast; from transformers import AutoModelForCausalLM;"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1]);"
        "print(model.model.layers[0].self_attn.q_proj.in_features)"
    )
    run = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["32"]


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"cache_implementation": "static", "disable_compile": True}, {"use_cache": False}]
)
def test_generate(options):
    sliced = sliced_model()
    prompt = tokens(2, 5)
    greedy = prompt
    with torch.no_grad():
        for _ in range(8):
            greedy = torch.cat([greedy, sliced(greedy).logits[:, -1:].argmax(-1)], 1)
    sliced.generation_config.eos_token_id = None
    generated = sliced.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False, pad_token_id=0, **options
    )
    assert generated.shape == (2, 13)
    if "num_beams" not in options:
        assert torch.equal(generated, greedy)


@torch.no_grad()
def test_left_padding_does_not_change_the_answer():
    sliced = sliced_model()
    ids = tokens(1, 7)
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), ids], 1)
    mask = (torch.arange(11) >= 4).long()[None]
    expected = sliced(ids).logits
    actual = sliced(padded, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits[:, 4:]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_hidden_states_and_attentions():
    output = sliced_model(attn_implementation="eager")(tokens(2, 9), output_hidden_states=True, output_attentions=True)
    assert [state.shape[-1] for state in output.hidden_states] == [32, 32, 32, 48]
    assert len(output.attentions) == 3


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("basis", ["per-norm", "shared"])
def test_cast_copy_and_state_dict(basis, loaded, tmp_path):
    sliced = sliced_model(basis=basis)
    if loaded:
        sliced.save_pretrained(tmp_path)
        sliced = AutoModelForCausalLM.from_pretrained(tmp_path)
    twin = copy.deepcopy(sliced)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
        assert twin(tokens(1, 5)).logits.abs().max() == 0
        twin.load_state_dict(sliced.state_dict())
        assert torch.equal(twin(tokens(1, 5)).logits, sliced(tokens(1, 5)).logits)
    assert {parameter.dtype for parameter in twin.to(torch.bfloat16).parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in twin.float().half().parameters()} == {torch.float16}


@pytest.mark.parametrize("basis", ["per-norm", "shared"])
def test_training_with_gradient_checkpointing(basis):
    sliced = sliced_model(basis=basis).train()
    ids = tokens(2, 9)
    loss = sliced(ids, labels=ids).loss
    expected = torch.autograd.grad(loss, list(sliced.parameters()))
    sliced.gradient_checkpointing_enable()
    sliced(ids, labels=ids).loss.backward()
    for gradient, (name, parameter) in zip(expected, sliced.named_parameters(), strict=True):
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-5)


def test_the_two_models_share_nothing():
    model = tiny_model("qwen3")
    before = copy.deepcopy(model.state_dict())
    sliced = slice_model(model, [tokens(4, 32)], sparsity=0.25, progress=False)
    with torch.no_grad():
        for parameter in sliced.parameters():
            parameter.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert slice_config_of(model) is None


def test_frozen_weights_stay_frozen():
    model = tiny_model().requires_grad_(False)
    sliced = slice_model(model, [tokens(4, 32)], sparsity=0.25, progress=False)
    assert not any(parameter.requires_grad for parameter in sliced.parameters())


@pytest.mark.parametrize("loaded", [False, True])
def test_lora(loaded, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    sliced = sliced_model()
    sliced.save_pretrained(tmp_path / "sliced")
    if loaded:
        sliced = AutoModelForCausalLM.from_pretrained(tmp_path / "sliced")
    adapted = get_peft_model(
        sliced, LoraConfig(target_modules=["q_proj", "down_proj", "feedforward_shortcut"], init_lora_weights=False)
    )
    ids = tokens(2, 9)
    adapted(ids, labels=ids).loss.backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in adapted.parameters() if parameter.requires_grad)
    adapted.save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "sliced")
    again = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        expected = adapted.eval()(ids).logits
        assert torch.equal(again(ids).logits, expected)
        torch.testing.assert_close(again.merge_and_unload()(ids).logits, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_compiles_without_a_graph_break():
    sliced = sliced_model()
    ids = tokens(2, 9)
    compiled = torch.compile(lambda x: sliced(x, use_cache=False).logits, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids), sliced(ids).logits, rtol=1e-4, atol=1e-4)


class TestDamagedCheckpoints:
    """Loading through plain transformers says what is wrong instead of filling in random weights."""

    @pytest.fixture
    def folder(self, tmp_path):
        sliced_model().save_pretrained(tmp_path)
        return tmp_path

    def test_truncated_file(self, folder):
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
        with pytest.raises(InputError, match=r"model\.safetensors is damaged .*: copy or write the checkpoint again"):
            AutoModelForCausalLM.from_pretrained(folder)

    def test_wrong_shape(self, folder):
        weights = load_file(folder / "model.safetensors")
        weights["model.layers.1.mlp.up_proj.weight"] = torch.zeros(80, 40)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(
            InputError, match=r"layers\.1\.mlp\.up_proj\.weight has shape \(80, 40\), its config asks for \(80, 32\)"
        ):
            AutoModelForCausalLM.from_pretrained(folder)

    def test_missing_tensor(self, folder):
        weights = load_file(folder / "model.safetensors")
        del weights["model.layers.1.feedforward_shortcut.weight"]
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(
            InputError, match=r"the checkpoint lacks weights \(such as model\.layers\.1\.feedforward_shortcut\.weight\)"
        ):
            AutoModelForCausalLM.from_pretrained(folder)

    @pytest.mark.parametrize(
        "change", [{"widths": [32] * 4}, {"groups": [0]}, {"widths": []}, {"full_width": "x"}, {"extra": 1}]
    )
    def test_a_plan_that_does_not_fit(self, folder, change):
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] |= change
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(InputError, match="quantization_config"):
            AutoModelForCausalLM.from_pretrained(folder)


def test_config_alone_tells_the_plan(tmp_path):
    sliced = sliced_model()
    sliced.save_pretrained(tmp_path)
    plan = slice_config_of(AutoConfig.from_pretrained(tmp_path))
    assert plan.plan() == slice_config_of(sliced).plan()
    assert plan.calibration_tokens == 128
