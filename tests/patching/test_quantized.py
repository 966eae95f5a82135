"""Patched models whose linear layers are quantised."""

import copy

import pytest
import torch
from models import tiny_model, tokens
from quantized import quantize_linears, quantized
from torch import nn
from transformers import DynamicCache

from slicegpt_fast import patch_model, patch_report, slice_model, unpatch_model
from slicegpt_fast.patching import steps
from slicegpt_fast.quantization import QuantizedLinear

PLANS = {"shared": dict(basis="shared", sparsity=0.2), "cuts": dict(target_params=0.8)}
CASES = [("llama", "dense"), ("llama", "shared"), ("llama", "cuts"), ("qwen3", "dense"), ("phi3", "cuts")]
CASES += [("gpt-neox", "shared"), ("opt", "shared")]


def model_of(family="llama", plan="dense", bits=4, group=32, **overrides):
    model = tiny_model(family, **overrides)
    sliced = model if plan == "dense" else slice_model(model, [tokens(4, 32)], **PLANS[plan], progress=False)
    return quantize_linears(sliced, bits, group)


@pytest.fixture
def native(monkeypatch):
    """The number of tokens of each native call."""
    calls = []
    run = steps.Program.run

    def counted(self, h, *others):
        calls.append(h.shape[1])
        return run(self, h, *others)

    monkeypatch.setattr(steps.Program, "run", counted)
    return calls


@torch.no_grad()
def conversation(model, sizes=(20, 1, 3, 1)):
    """The logits of tokens that come ``sizes`` at a time."""
    ids, cache = tokens(2, sum(sizes), seed=3), DynamicCache(config=model.config)
    return torch.cat([model(part, past_key_values=cache).logits for part in ids.split(sizes, dim=1)], dim=1)


def close(a, b, rounding=1e-5):
    return bool((a - b).abs().max() <= rounding * (b.max() - b.min()))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("family", "plan"), CASES)
def test_computes_what_the_unpatched_model_does(family, plan, bits, native):
    model = model_of(family, plan, bits, None if bits == 8 else 32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = conversation(model)
    patch_model(model)
    report = patch_report(model)
    assert [row.reason for row in report.rows] == [None] * len(report.rows)
    assert "in one native call" in report.steps
    native.clear()
    assert close(conversation(model), expected)
    assert native == [1, 3, 1]
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    unpatch_model(model)
    assert torch.equal(conversation(model), expected)
    storages = {value.untyped_storage().data_ptr() for value in model.state_dict().values()}
    assert len(storages) >= len(set(map(id, model.parameters())))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype, native):
    model = model_of("llama", "cuts", 4, 64, dtype=dtype)
    expected = conversation(model)
    patch_model(model)
    native.clear()
    assert close(conversation(model), expected, 0.05)
    assert native == [1, 3, 1]


def test_readers_of_one_op_are_one_matrix_with_its_scales():
    model = patch_model(model_of())
    attention = model.model.layers[0].self_attn
    for name in ("weight", "scales"):
        q, k, v = (getattr(linear, name) for linear in (attention.q_proj, attention.k_proj, attention.v_proj))
        assert q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr() == v.untyped_storage().data_ptr()
        assert k.storage_offset() == q.numel()
        assert v.storage_offset() == q.numel() + k.numel()
        assert k.is_contiguous()


@torch.no_grad()
def test_new_integers_and_scales_are_used(native):
    model, other = patch_model(model_of()), model_of()
    conversation(model)
    for part in (model, other):
        linear = part.model.layers[1].mlp.down_proj
        linear.scales.data = linear.scales * 2
        part.model.layers[0].mlp.up_proj.weight.data = 255 - part.model.layers[0].mlp.up_proj.weight
        part.model.layers[2].self_attn.q_proj.scales.mul_(0.5)
    native.clear()
    assert close(conversation(model), conversation(other))
    assert native == [1, 3, 1]
    model.load_state_dict(model_of(bits=4, group=32).state_dict())
    assert close(conversation(model), conversation(model_of()))


def test_weights_of_one_op_have_one_format():
    model = tiny_model()
    quantize_linears(model, 4, 32, only="layers.0.mlp.gate_proj")
    quantize_linears(model, 8, None, only="layers.1.self_attn.q_proj")
    quantize_linears(model, 4, 32, only="layers.1.self_attn")
    quantize_linears(model, 8, None, only="layers.2.mlp.down_proj")
    expected = conversation(model)
    patch_model(model)
    reasons = {row.layer: row.reason for row in patch_report(model).rows if row.reason is not None}
    assert reasons == {
        "model.layers.0.feedforward": "only some of its weights are quantised",
        "model.layers.1.attention": "its weights are quantised in more than one format",
    }
    assert close(conversation(model), expected)


def test_what_no_longer_fits_runs_unfused():
    model = patch_model(model_of())
    linear = model.model.layers[0].mlp.down_proj
    linear.scales = nn.Parameter(linear.scales.float(), requires_grad=False)
    linear = model.model.layers[1].mlp.down_proj
    linear.weight, linear.scales = (
        nn.Parameter(x, requires_grad=False) for x in quantized(linear.dequantized(torch.float32), 4, None)
    )
    linear = model.model.layers[2].self_attn.o_proj
    del linear._parameters["scales"]
    linear.scales = torch.ones(linear.out_features, 2).half()
    rows = {row.layer: row.reason for row in patch_report(model).rows}
    assert rows["model.layers.0.feedforward"] == "its quantised weights and their scales do not fit each other"
    assert rows["model.layers.1.feedforward"] is None
    assert rows["model.layers.2.attention"] == "one of its weights is no parameter of its module"


def test_a_subclass_is_not_fused():
    class Traced(QuantizedLinear):
        pass

    model = model_of()
    model.model.layers[0].mlp.down_proj.__class__ = Traced
    patch_model(model)
    reason = next(row.reason for row in patch_report(model).rows if row.layer == "model.layers.0.feedforward")
    assert "not a plain linear layer" in reason


def test_copies_and_the_head(native):
    model = tiny_model()
    head = QuantizedLinear(*quantized(model.lm_head.weight.detach(), 8), model.lm_head.in_features)
    model.lm_head = head.eval()
    quantize_linears(model, 8, None)
    expected = conversation(model)
    patch_model(model)
    assert [row.reason for row in patch_report(model).rows] == [None] * 7
    duplicate = copy.deepcopy(model)
    native.clear()
    assert close(conversation(duplicate), expected)
    assert close(conversation(model), expected)
    assert native == 2 * [1, 3, 1]


def test_compiled_graphs():
    model = patch_model(model_of())
    expected = conversation(model, (6,))
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        assert close(compiled(tokens(2, 6, seed=3)).logits, expected)


def test_long_prompts_go_through_the_ops(monkeypatch):
    """They dequantise faster than torch; a model in full goes through torch's own layers."""
    from slicegpt_fast.patching import layers

    rows = []
    norm_linear = layers.norm_linear
    monkeypatch.setattr(
        layers, "norm_linear", lambda h, *rest, **named: (rows.append(len(h)), norm_linear(h, *rest, **named))[1]
    )
    model = model_of()
    expected = conversation(model, (90,))
    patch_model(model)
    rows.clear()
    assert close(conversation(model, (90,)), expected)
    assert rows == [180] * 6
