"""A cut model is an ordinary Hugging Face model: it generates, trains, takes adapters and compiles like one."""

import copy
import json

import pytest
import torch
from models import tiny_model, tokens
from slicing.cuts.test_families import CALIBRATION, WIDTHS, assert_close, cut_family, logits
from transformers import AutoModelForCausalLM

from slicegpt_fast import InputError, patch_model, patch_report, slice_model, unpatch_model
from slicegpt_fast.slicing import SliceOptions
from slicegpt_fast.slicing.heads import CutHeads, FollowProjections, PadValues

GENERATING = ["llama", "mistral", "qwen3", "gpt2", "phi3", "gpt-neox", "falcon-40b", "mixtral"]
ADAPTED = {
    "llama": ["v_proj", "o_proj", "down_proj"],
    "qwen2": ["q_proj", "v_proj", "o_proj"],
    "gpt2": ["c_attn", "c_proj"],
    "phi3": ["qkv_proj", "o_proj", "down_proj"],
    "gpt-neox": ["query_key_value", "dense"],
}


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"cache_implementation": "static", "disable_compile": True}, {"use_cache": False}]
)
@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
@pytest.mark.parametrize("family", GENERATING)
def test_generate(family, width, options):
    """Mistral's window of 8 tokens is left behind on the way."""
    cut, prompt = cut_family(family, width), tokens(2, 5)
    greedy = prompt
    for _ in range(12):
        greedy = torch.cat([greedy, logits(cut, greedy)[:, -1:].argmax(-1)], 1)
    cut.generation_config.eos_token_id = None
    generated = cut.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False, pad_token_id=0, **options
    )
    assert generated.shape == (2, 17)
    if "num_beams" not in options:
        assert torch.equal(generated, greedy)


@pytest.mark.parametrize("family", GENERATING)
def test_left_padding_does_not_change_the_answer(family):
    cut, ids = cut_family(family), tokens(1, 7)
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), ids], 1)
    mask = (torch.arange(11) >= 4).long()[None]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    assert_close(logits(cut, padded, attention_mask=mask, position_ids=positions)[:, 4:], logits(cut, ids), 1e-4)


@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon-40b", "mixtral"])
def test_training_with_gradient_checkpointing(family, width):
    cut, ids = cut_family(family, width).train().requires_grad_(), tokens(2, 9)
    for module in cut.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    expected = torch.autograd.grad(cut(ids, labels=ids).loss, list(cut.parameters()))
    cut.gradient_checkpointing_enable()
    cut(ids, labels=ids).loss.backward()
    for gradient, (name, parameter) in zip(expected, cut.named_parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-5)
        if "bias" not in name:  # a key's changes nothing, a cut value's is zero padding
            assert gradient.abs().max() > 0, name


@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
@pytest.mark.parametrize("family", ADAPTED)
def test_adapters(family, width, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    cut, ids = cut_family(family, width), tokens(2, 9)
    cut.save_pretrained(tmp_path / "cut")
    plain = logits(cut, ids)
    adapted = get_peft_model(cut, LoraConfig(target_modules=ADAPTED[family], fan_in_fan_out=family == "gpt2"))
    assert torch.equal(logits(adapted.eval(), ids), plain)
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        adapted(ids, labels=ids).loss.backward()
        optimizer.step()
    assert all(parameter.grad.abs().max() > 0 for parameter in adapted.parameters() if parameter.requires_grad)
    expected = logits(adapted, ids)
    assert (expected - plain).abs().max() > 1e-4 * (plain.max() - plain.min())
    adapted.save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "cut")
    assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path / "adapter").eval(), ids), expected)
    assert torch.equal(logits(copy.deepcopy(adapted).unload(), ids), plain)
    merged = adapted.merge_and_unload()
    assert_close(logits(merged, ids), expected)
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), ids), logits(merged, ids))


@pytest.mark.parametrize(("family", "width"), [("llama", 40), ("gpt2", 48), ("falcon-40b", 40)])
def test_compiles_without_a_graph_break(family, width):
    cut, ids = cut_family(family, width), tokens(2, 9)
    expected = logits(cut, ids)
    for patched in (False, True):
        torch._dynamo.reset()
        if patched:
            patch_model(cut)
        compiled = torch.compile(lambda x: cut(x, use_cache=False).logits, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            assert_close(compiled(ids), expected)


class TestHooks:
    """The three hooks of narrow values belong to a fused attention; any other hook still undoes its fusion."""

    def test_each_projection_has_one(self):
        attention = cut_family().model.layers[0].self_attn
        assert [type(hook) for hook in attention.v_proj._forward_hooks.values()] == [PadValues]
        assert [type(hook) for hook in attention.o_proj._forward_pre_hooks.values()] == [CutHeads]
        assert [type(hook) for hook in attention._forward_pre_hooks.values()] == [FollowProjections]

    @pytest.mark.parametrize("path", ["self_attn", "self_attn.v_proj", "self_attn.o_proj"])
    def test_another_hook_is_honoured(self, path):
        cut, ids = patch_model(cut_family()), tokens(2, 9)
        before = logits(cut, ids)
        module = cut.model.layers[0].get_submodule(path)
        handle = module.register_forward_hook(lambda _, arguments, output: None)
        assert "a hook on one of its modules" in str(patch_report(cut))
        assert_close(logits(cut, ids), before)
        handle.remove()
        assert patch_report(cut).fused == 7

    def test_adapters_on_a_patched_model_and_off_again(self):
        from peft import LoraConfig, get_peft_model

        cut, ids = patch_model(cut_family()), tokens(2, 9)
        before = logits(cut, ids)
        adapted = get_peft_model(cut, LoraConfig(target_modules=["v_proj", "o_proj"], init_lora_weights=False))
        changed = logits(adapted.eval(), ids)
        assert (changed - before).abs().max() > 0
        assert patch_report(cut).fused == 4
        assert_close(logits(unpatch_model(cut), ids), changed)
        assert_close(logits(adapted.unload(), ids), before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cut")
    cut_family().save_pretrained(folder)
    return folder


class TestRefused:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"cut": ("heads",)}, r"cut must be 'auto' or some of 'stream', 'channels', 'values', not \('heads',\)"),
            ({"cut": "channels"}, "cut must be 'auto' or some of .*, not 'channels'"),
            ({"cut": ("values", "values")}, "cut must be 'auto' or some of"),
            ({"cut": ()}, "cut must be 'auto' or some of"),
            ({"cut": 3}, "cut must be 'auto' or some of .*, not 3"),
            ({"cut": [["values"]]}, "cut must be 'auto' or some of"),
            ({"cut": "auto", "basis": "shared"}, "cut chooses basis itself: leave one of the two out"),
            ({"cut": "auto", "refit": True}, "cut chooses refit itself"),
            ({"basis": "shared", "uniform": True}, "budget and uniform belong to cut"),
            ({"basis": "shared", "budget": "bytes"}, "budget and uniform belong to cut"),
            ({"budget": "money"}, "budget must be one of 'params', 'bytes', 'flops', not 'money'"),
        ],
    )
    def test_options(self, options, message):
        with pytest.raises(InputError, match=message):
            SliceOptions(target_params=0.8, **options)

    @pytest.mark.parametrize("options", [{"sparsity": 0.2, "cut": "auto"}, {"widths": [32] * 7, "cut": ("values",)}])
    def test_a_cut_without_a_budget(self, options):
        with pytest.raises(InputError, match="cut spends a budget: give target_params"):
            SliceOptions(**options)

    def test_a_budget_that_no_sizes_meet(self):
        with pytest.raises(InputError, match=r"stored parameters cannot be met: the smallest sizes store .* more axes"):
            slice_model(tiny_model(), CALIBRATION, target_params=0.1, progress=False)

    def test_a_model_that_is_cut_already(self):
        with pytest.raises(InputError, match="the model is sliced or quantised already"):
            slice_model(cut_family(), CALIBRATION, target_params=0.9, progress=False)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"channels": [80, 64]}, r"channels \(80, 64\), which does not fit 3 layers of up to 80"),
            ({"channels": [80, 64, 96]}, "does not fit 3 layers of up to 80"),
            ({"channels": [80, 64, 0]}, "does not fit 3 layers of up to 80"),
            ({"channels": [80, 64, "64"]}, "does not fit 3 layers of up to 80"),
            ({"channels": 64}, "channels 64, which does not fit"),
            ({"channels": None}, "channels None, which does not fit"),
            ({"channels": []}, r"has shape .*, its config asks for"),
            ({"channels": [80, 64, 48]}, r"has shape .*, its config asks for \(48, 48\)"),
            ({"values": [8, 13, 8]}, r"values \(8, 13, 8\), which does not fit 3 layers of up to 12"),
            ({"values": [8, True, 8]}, "does not fit 3 layers of up to 12"),
            ({"values": {"0": 8}}, "does not fit 3 layers of up to 12"),
            ({"values": [8, 8, 8]}, r"has shape .*, its config asks for"),
            ({"widths": [40] * 7}, "no basis, which leaves the stream at 48, but a size of 40"),
            ({"widths": 48}, "gives widths and groups as lists, not 48"),
            ({"sizes": [1]}, "not a plan that this version reads"),
        ],
    )
    def test_a_config_that_was_changed(self, folder, change, message, tmp_path):
        for file in folder.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        config = json.loads((tmp_path / "config.json").read_text())
        config["quantization_config"] |= change
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(InputError, match=message):
            AutoModelForCausalLM.from_pretrained(tmp_path)


def with_padded_weights(cut):
    """A copy whose values are padded with zero rows of the weights, in place of hooks."""
    copied = copy.deepcopy(cut)
    for layer in copied.model.layers:
        attention = layer.self_attn
        for module in (attention, attention.v_proj, attention.o_proj):
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
        values, heads = attention.v_proj, attention.o_proj
        groups, queries = (copied.config.num_key_value_heads, copied.config.num_attention_heads)
        rows = values.weight.data.unflatten(0, (groups, -1))
        missing = attention.head_dim - rows.shape[1]
        values.weight.data = torch.nn.functional.pad(rows, (0, 0, 0, missing)).flatten(0, 1)
        columns = heads.weight.data.unflatten(1, (queries, -1))
        heads.weight.data = torch.nn.functional.pad(columns, (0, missing)).flatten(1)
    return copied


@pytest.mark.parametrize("patched", [False, True])
def test_a_quantised_cache_holds_values_of_lower_rank(patched):
    from transformers import QuantizedCache

    cut, ids = cut_family("llama"), tokens(2, 16)
    dense = with_padded_weights(cut)
    if patched:
        patch_model(cut)
    caches = [QuantizedCache("fp8", model.config) for model in (cut, dense)]
    for step in (ids[:, :13], ids[:, 13:14], ids[:, 14:16]):
        actual, expected = (logits(m, step, past_key_values=c) for m, c in zip((cut, dense), caches, strict=True))
        assert_close(actual, expected, 1e-3)
    assert not torch.allclose(actual, logits(dense, ids)[:, -2:], rtol=1e-3)  # it was quantised
    kept = caches[0].layers[0]._dequantize(caches[0].layers[0]._quantized_values)
    assert kept[..., :8].any()
    assert not kept[..., 8:].any()
