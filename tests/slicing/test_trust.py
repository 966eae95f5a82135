"""Slicing takes stock models alone: whatever a user did to a module is refused, with the module's name."""

import copy
import functools
import types

import pytest
import torch
from models import FAMILIES, tiny_model, tokens
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.nn.utils import prune
from transformers import GPT2Config, GPT2DoubleHeadsModel, LlamaForCausalLM
from transformers.models.llama import modeling_llama

from slicegpt_fast import InputError, slice_model
from slicegpt_fast.architectures import Decoder
from slicegpt_fast.slicing import SliceOptions, make_plan
from slicegpt_fast.slicing.selfcheck import check_layers
from slicegpt_fast.slicing.trust import check_trusted


class ClampedMLP(modeling_llama.LlamaMLP):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)).clamp(max=0.05) * self.up_proj(x))


class ScaledLayer(modeling_llama.LlamaDecoderLayer):
    def forward(self, hidden_states, *args, **kwargs):
        return hidden_states + 0.25 * (super().forward(hidden_states, *args, **kwargs) - hidden_states)


class ShiftedNorm(modeling_llama.LlamaRMSNorm):
    def forward(self, hidden_states):
        return super().forward(hidden_states) * (1 + self.weight) / self.weight


class Linear(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


class Wrapped(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


class OwnModel(LlamaForCausalLM):
    pass


def of_class(path, cls):
    def spoil(model):
        model.get_submodule(path).__class__ = cls

    return spoil


def replaced(path, make):
    def spoil(model):
        model.set_submodule(path, make(model.get_submodule(path)))

    return spoil


def own_forward(path):
    def spoil(model):
        module = model.get_submodule(path)
        module.forward = types.MethodType(type(module).forward, module)

    return spoil


def hooked(path):
    return lambda model: model.get_submodule(path).register_forward_hook(lambda module, args, output: None)


def with_parameter(path, name):
    return lambda model: setattr(model.get_submodule(path), name, nn.Parameter(torch.ones(48)))


def with_constant(path, name, value):
    return lambda model: setattr(model.get_submodule(path), name, value)


def parametrized(model):
    nn.utils.parametrizations.weight_norm(model.model.layers[1].mlp.down_proj)


def pruned(model):
    prune.l1_unstructured(model.model.layers[1].mlp.down_proj, "weight", 0.5)


def sharing_a_module(model):
    model.model.layers[1].mlp = model.model.layers[0].mlp


def adapted(target):
    def spoil(model):
        from peft import LoraConfig, get_peft_model

        get_peft_model(model, LoraConfig(target_modules=[target]))

    return spoil


LAYER = r"model\.layers\.1"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (of_class("model.layers.1.mlp", ClampedMLP), rf"{LAYER}\.mlp is a .*\.ClampedMLP, not a .*\.LlamaMLP"),
        (of_class("model.layers.1", ScaledLayer), rf"{LAYER} is a .*\.ScaledLayer, not a .*\.LlamaDecoderLayer"),
        (of_class("model.norm", ShiftedNorm), r"model\.norm is a .*\.ShiftedNorm, not a .*\.LlamaRMSNorm"),
        (
            of_class("model.layers.1.mlp.up_proj", Linear),
            rf"{LAYER}\.mlp\.up_proj is a .*trust\.Linear, not a torch",
        ),
        (of_class("lm_head", Linear), r"lm_head is a .*\.Linear, not a torch\.nn\.modules\.linear\.Linear"),
        (replaced("model.layers.1.mlp", Wrapped), rf"{LAYER}\.mlp is a .*\.Wrapped, not a .*\.LlamaMLP"),
        (replaced("model.layers.1.self_attn", Wrapped), rf"{LAYER}\.self_attn is a .*\.Wrapped"),
        (replaced("model.layers.1.mlp.act_fn", lambda _: nn.ReLU()), rf"{LAYER}\.mlp\.act_fn is a .*\.ReLU, not a"),
        (replaced("model.layers.1", torch.compile), rf"{LAYER} is a torch\._dynamo\..*OptimizedModule"),
        (
            lambda model: model.model.layers[1].mlp.add_module("extra", nn.Linear(48, 48)),
            rf"{LAYER}\.mlp\.extra is a torch\.nn\.modules\.linear\.Linear that a stock LlamaForCausalLM lacks",
        ),
        (sharing_a_module, rf"{LAYER}\.mlp, a .*\.LlamaMLP in a stock LlamaForCausalLM, is missing here or the same"),
        (own_forward("model.layers.1"), rf"{LAYER} \(.*\.LlamaDecoderLayer\) has a forward of its own"),
        (own_forward("model.layers.1.mlp.gate_proj"), rf"{LAYER}\.mlp\.gate_proj \(.*\) has a forward of its own"),
        (own_forward("model.embed_tokens"), r"model\.embed_tokens \(.*\) has a forward of its own"),
        (hooked("model.layers.1.input_layernorm"), rf"{LAYER}\.input_layernorm \(.*\) has a forward hook"),
        (hooked("model.layers.1"), rf"{LAYER} \(.*\) has a forward hook \(.*hooked.*\)"),
        (hooked("lm_head"), r"lm_head \(.*\) has a forward hook"),
        (with_parameter("model.layers.1", "scale"), rf"{LAYER} \(.*\) holds a parameter 'scale'"),
        (with_parameter("model.norm", "bias"), r"model\.norm \(.*\) holds a parameter 'bias'"),
        (with_constant("model.layers.1.mlp.down_proj", "bias", None), rf"{LAYER}\.mlp\.down_proj .* lacks .* 'bias'"),
        (with_constant("model.norm", "variance_epsilon", 0.5), r"model\.norm .* has variance_epsilon=0\.5, but its"),
        (with_constant("model.layers.1.self_attn", "scaling", 9.0), rf"{LAYER}\.self_attn .* has scaling=9\.0"),
        (parametrized, r"layers\.1\.mlp\.down_proj is a torch\.nn\.utils\.parametrize\.ParametrizedLinear, not a"),
        (pruned, r"layers\.1\.mlp\.down_proj \(torch\.nn\.modules\.linear\.Linear\) lacks the parameter 'weight'"),
        (adapted("lm_head"), r"lm_head is a peft\.tuners\.lora\.layer\.Linear, not a torch\.nn\.modules\.linear"),
        (adapted("embed_tokens"), r"model\.embed_tokens is a peft\.tuners\.lora\.layer\.Embedding"),
        (lambda model: setattr(model, "__class__", OwnModel), r"the model is a .*\.OwnModel, and slicing knows the"),
    ],
)
def test_what_is_not_stock_is_refused(spoil, message):
    model = tiny_model()
    spoil(model)
    for basis in ("per-norm", "shared"):
        with pytest.raises(InputError, match=message):
            make_plan(model, SliceOptions(sparsity=0.25, basis=basis))


@pytest.mark.parametrize("register", [register_module_forward_hook, register_module_forward_pre_hook])
def test_hooks_on_all_modules_are_refused(register):
    handle = register(lambda *_: None)
    try:
        with pytest.raises(InputError, match="registered on all modules: remove it before slicing"):
            make_plan(tiny_model(), SliceOptions(sparsity=0.25))
    finally:
        handle.remove()


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("cls", [modeling_llama.LlamaMLP, modeling_llama.LlamaRMSNorm, nn.Linear])
def test_a_forward_replaced_in_a_class_is_refused(cls, wrapped, monkeypatch):
    before = cls.forward

    def forward(self, x):
        return 2 * before(self, x)

    monkeypatch.setattr(cls, "forward", functools.wraps(before)(forward) if wrapped else forward)
    with pytest.raises(InputError, match=rf"{cls.__name__}\.forward was replaced by .*: restore it before slicing"):
        make_plan(tiny_model(), SliceOptions(sparsity=0.25))


def test_a_class_replaced_in_transformers_module_is_refused(monkeypatch):
    monkeypatch.setattr(modeling_llama, "LlamaMLP", ClampedMLP)
    with pytest.raises(InputError, match=r"layers\.0\.mlp is a .*\.ClampedMLP, and slicing does not know what it"):
        make_plan(tiny_model(), SliceOptions(sparsity=0.25))


class TypedTensor(torch.Tensor):
    """As quantisation libraries put into plain linear layers."""


def test_a_parameter_of_another_class_is_refused():
    model = tiny_model()
    weight = model.model.layers[0].mlp.up_proj.weight
    model.model.layers[0].mlp.up_proj.weight = nn.Parameter(weight.detach().as_subclass(TypedTensor))
    with pytest.raises(InputError, match=r"up_proj\.weight is a .*\.TypedTensor, not a plain parameter"):
        make_plan(model, SliceOptions(sparsity=0.25))


def test_heads_beside_the_language_head_are_refused():
    model = GPT2DoubleHeadsModel(GPT2Config(vocab_size=97, n_embd=48, n_layer=2, n_head=4)).eval()
    with pytest.raises(InputError, match=r"GPT2DoubleHeadsModel, and slicing knows the causal language models"):
        make_plan(model, SliceOptions(sparsity=0.25, slice_head=True))


def test_projections_around_the_embedding_are_refused():
    with pytest.raises(InputError, match=r"slicing does not know model\.decoder\.project_(in|out)\.weight"):
        make_plan(tiny_model("opt", word_embed_proj_dim=24), SliceOptions(sparsity=0.25))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_stock_models_pass_after_use(family):
    """Training and evaluation, output of hidden states, casts and frozen weights leave a model stock."""
    model = tiny_model(family, attn_implementation="eager")
    model(tokens(2, 9), output_hidden_states=True, output_attentions=True)
    model = copy.deepcopy(model.train().requires_grad_(False).bfloat16()).eval()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable()
    check_trusted(Decoder(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_stock_layers_pass_the_self_check(family, dtype):
    model = tiny_model(family, dtype=dtype)
    before = copy.deepcopy(model.state_dict())
    check_layers(model, [tokens(4, 32)])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert type(model) is type(tiny_model(family))
    assert not any("shortcut" in name for name, _ in model.named_modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("path", "cls"),
    [
        ("model.layers.1", ScaledLayer),
        ("model.layers.1.input_layernorm", ShiftedNorm),
        ("model.layers.1.post_attention_layernorm", ShiftedNorm),
    ],
)
def test_the_self_check_finds_what_it_was_not_told(path, cls, dtype):
    model = tiny_model(dtype=dtype)
    check_layers(model, [tokens(4, 32)])
    of_class(path, cls)(model)
    with pytest.raises(InputError, match=r"model\.layers\.1 \(.*\), when it is rotated, differs from the dense layer"):
        check_layers(model, [tokens(4, 32)])


def test_the_self_check_finds_a_reader_that_the_table_does_not_name():
    class MLP(modeling_llama.LlamaMLP):
        def forward(self, x):
            return super().forward(x) + 0.01 * self.down_proj(self.extra(x))

    model = tiny_model()
    mlp = model.model.layers[2].mlp
    mlp.extra, mlp.__class__ = nn.Linear(48, 80), MLP
    with pytest.raises(InputError, match=r"model\.layers\.2 "):
        check_layers(model, [tokens(4, 32)])


def test_slice_model_runs_the_self_check(monkeypatch):
    monkeypatch.setattr("slicegpt_fast.slicing.plan.check_trusted", lambda *_: None)
    model = tiny_model()
    of_class("model.layers.0", ScaledLayer)(model)
    with pytest.raises(InputError, match=r"model\.layers\.0 .* differs from the dense layer"):
        slice_model(model, [tokens(4, 32)], sparsity=0.25, progress=False)
    slice_model(model, [tokens(4, 32)], sparsity=0.25, check=False, progress=False)


def test_the_self_check_skips_padding():
    ids = tokens(2, 20)
    mask = (torch.arange(20) >= 5).long().expand(2, -1)
    check_layers(tiny_model(), [{"input_ids": ids, "attention_mask": mask}])
