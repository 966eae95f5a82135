"""Whatever is done to a patched model, or was done to it before, it computes what its unpatched twin computes."""

import copy
import gc
import io
import types
import weakref
from functools import partial

import peft
import pytest
import torch
from models import tiny_model, tokens
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.nn.utils import parametrizations, parametrize, prune
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.models.llama import modeling_llama

from slicegpt_fast import patch_model, patch_report, slice_model, unpatch_model
from slicegpt_fast.ops import residual_linear
from slicegpt_fast.patching import layers as patched_layers

IDS = tokens(2, 8, seed=1)  # few enough for the ops of a dense model
PLANS = {"dense": None, "shared": dict(basis="shared"), "aligned": dict(shortcut="aligned", shortcut_rank=5)}


def model_of(plan="dense", family="llama", **overrides):
    model = tiny_model(family, **overrides)
    return (
        model if plan == "dense" else slice_model(model, [tokens(4, 32)], sparsity=0.2, progress=False, **PLANS[plan])
    )


@torch.no_grad()
def logits(model, **arguments):
    return model(IDS, use_cache=False, **arguments).logits


def assert_equal_models(patched, twin, grad=torch.no_grad):
    with grad():
        a, b = patched(IDS, use_cache=False).logits, twin(IDS, use_cache=False).logits
    assert (a - b).abs().max() <= 1e-5 * (b.max() - b.min())


def reasons(model):
    return {row.layer: row.reason for row in patch_report(model).rows if row.reason}


def twins(plan="dense", family="llama", **overrides):
    twin = model_of(plan, family, **overrides)
    return patch_model(copy.deepcopy(twin)), twin


class Linear(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


class MLP(modeling_llama.LlamaMLP):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)).clamp(max=0.05) * self.up_proj(x))


class Layer(modeling_llama.LlamaDecoderLayer):
    def forward(self, hidden_states, *arguments, **named):
        return hidden_states + 0.25 * (super().forward(hidden_states, *arguments, **named) - hidden_states)


class Norm(modeling_llama.LlamaRMSNorm):
    def forward(self, x):
        return super().forward(x) * 1.5


class Attention(modeling_llama.LlamaAttention):
    def forward(self, hidden_states, **named):
        return super().forward(hidden_states * 1.5, **named)


class SiLU(type(tiny_model().model.layers[0].mlp.act_fn)):
    def forward(self, x):
        return super().forward(x) + 0.1


class Wrap(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *arguments, **named):
        return self.inner(*arguments, **named)


class Int8Linear(nn.Module):
    """As quantising libraries have them: the weight is a buffer."""

    def __init__(self, linear):
        super().__init__()
        self.scale = nn.Buffer(linear.weight.detach().abs().amax(1, keepdim=True) / 127)
        self.weight = nn.Buffer((linear.weight.detach() / self.scale).round().to(torch.int8))

    def forward(self, x):
        return nn.functional.linear(x, self.weight * self.scale)


CLASSES = {
    "mlp.up_proj": Linear,
    "self_attn.o_proj": Linear,
    "mlp": MLP,
    "": Layer,
    "input_layernorm": Norm,
    "self_attn": Attention,
    "mlp.act_fn": SiLU,
}


def swap_class(model, path):
    for layer in model.model.layers:
        layer.get_submodule(path).__class__ = CLASSES[path]


def wrap(model, path):
    for layer in model.model.layers:
        layer.set_submodule(path, Wrap(layer.get_submodule(path)))


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("path", CLASSES)
def test_a_module_of_another_class(path, when):
    twin = model_of()
    model = copy.deepcopy(twin)
    swap_class(twin, path)
    if when == "before":
        swap_class(model, path)
        if path == "":
            with pytest.warns(UserWarning, match=r"test_guards.Layer, not the family's own"):
                patch_model(model)
        else:
            patch_model(model)
    else:
        logits(patch_model(model))
        swap_class(model, path)
    assert_equal_models(model, twin)
    found = set(reasons(model).values())
    if path == "mlp.act_fn" and when == "before":
        assert not found  # any activation is called as it is
    elif path != "" or when == "before":
        assert any(CLASSES[path].__qualname__ in reason and "test_guards" in reason for reason in found), found
    assert_equal_models(copy.deepcopy(model), twin)
    assert_equal_models(unpatch_model(model), twin)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("path", ["mlp", "self_attn", "self_attn.v_proj", "mlp.down_proj", "post_attention_layernorm"])
def test_a_wrapped_module(path, when):
    twin = model_of()
    model = copy.deepcopy(twin)
    wrap(twin, path)
    if when == "before":
        wrap(model, path)
        patch_model(model)
        assert any(f"its {path} is a " in reason and "Wrap" in reason for reason in reasons(model).values())
    else:
        logits(patch_model(model))
        wrap(model, path)
        assert "one of its modules was replaced" in reasons(model).values()
    assert_equal_models(model, twin)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    "cls",
    [nn.Linear, *(getattr(modeling_llama, f"Llama{name}") for name in ("MLP", "Attention", "RMSNorm", "DecoderLayer"))],
)
def test_a_class_that_got_another_forward(cls, when, monkeypatch):
    twin = model_of()
    model = copy.deepcopy(twin)
    if when == "after":
        logits(patch_model(model))
    original = cls.forward

    def changed(self, x, *arguments, **named):
        return original(self, x * 1.25, *arguments, **named)

    def attention(self, hidden_states, **named):
        return original(self, hidden_states * 1.25, **named)

    monkeypatch.setattr(cls, "forward", attention if cls is modeling_llama.LlamaAttention else changed)
    if when == "before":
        if cls in (nn.Linear, modeling_llama.LlamaDecoderLayer):
            with pytest.warns(UserWarning, match="no decoder layer was patched"):
                patch_model(model)
        else:
            patch_model(model)
    assert_equal_models(model, twin)
    monkeypatch.undo()
    assert_equal_models(model, twin)


@pytest.mark.parametrize("register", [register_module_forward_hook, register_module_forward_pre_hook])
def test_hooks_on_all_modules(register):
    model, twin = twins()

    def hook(module, inputs, output=None):
        if type(module) is nn.Linear:
            return output * 1.5 if output is not None else (inputs[0] * 1.5,)
        return None

    handle = register(hook)
    try:
        assert_equal_models(model, twin)
    finally:
        handle.remove()
    assert_equal_models(model, twin)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_parameter_that_the_family_does_not_have(name):
    if name == "gpt2":
        config = GPT2Config(vocab_size=97, n_embd=48, n_layer=2, n_head=4, add_cross_attention=True)
        layers = (model := GPT2LMHeadModel(config).eval()).transformer.h
        unknown = "ln_cross_attn.weight"
    else:
        layers = (model := model_of()).model.layers
        for layer in layers:
            layer.gate = nn.Parameter(torch.zeros(1))
        unknown = "gate"
    with pytest.warns(UserWarning, match="no decoder layer was patched"):
        patch_model(model)
    assert sum(f"has a parameter {unknown}" in str(r) or "crossattention" in str(r) for r in reasons(model).values())


def add_bias(model, path):
    linear = model.model.layers[0].get_submodule(path)
    linear.bias = nn.Parameter(torch.linspace(-1, 1, linear.out_features))


def remove_bias(model, path):
    model.model.layers[0].get_submodule(path).bias = None


@pytest.mark.parametrize(
    ("change", "plan", "path"),
    [
        *((add_bias, "dense", path) for path in ("mlp.down_proj", "mlp.up_proj", "self_attn.k_proj")),
        *((add_bias, "aligned", path) for path in ("attention_shortcut.up", "attention_shortcut.down")),
        *((remove_bias, "dense", path) for path in ("mlp.down_proj", "self_attn.q_proj", "self_attn.o_proj")),
    ],
)
def test_biases_put_on_and_taken_off(change, plan, path):
    model, twin = twins(plan, **({} if change is remove_bias else dict(attention_bias=False, mlp_bias=False)))
    logits(model)
    for each in (model, twin):
        change(each, path)
    assert_equal_models(model, twin)
    assert_equal_models(unpatch_model(model), twin)


@pytest.mark.parametrize("plan", ["dense", "shared"])
@pytest.mark.parametrize("norm", ["input_layernorm", "post_attention_layernorm"])
def test_another_eps(plan, norm):
    model, twin = twins(plan)
    logits(model)
    for each in (model, twin):
        module = each.model.layers[0].get_submodule(norm)
        setattr(module, "eps" if plan == "shared" else "variance_epsilon", 5.0)
    assert_equal_models(model, twin)
    assert patch_report(model).fused == 7


@torch.no_grad()
def through_data(linear):
    linear.weight.data = linear.weight.data * 3


@torch.no_grad()
def through_numpy(linear):
    linear.weight.detach().numpy()[:] *= 3


@torch.no_grad()
def through_a_new_parameter(linear):
    linear.weight = nn.Parameter(linear.weight * 3)


@torch.no_grad()
def in_place(linear):
    linear.weight.mul_(3)


@torch.no_grad()
def fewer_rows_in_the_same_memory(linear):
    linear.weight.data = linear.weight.data.flip(0).T.contiguous().T


@torch.no_grad()
def as_a_plain_tensor(linear):
    weight = linear.weight.detach() * 3
    del linear.weight
    linear.weight = weight


WRITES = [through_data, through_numpy, through_a_new_parameter, in_place, fewer_rows_in_the_same_memory]


@pytest.mark.parametrize("path", ["mlp.up_proj", "mlp.down_proj", "self_attn.v_proj"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("write", [*WRITES, as_a_plain_tensor])
def test_other_weights(write, path, compiled):
    if compiled and path != "mlp.up_proj":
        pytest.skip("one path is enough")
    model, twin = twins("shared", num_hidden_layers=2)
    run = torch.compile(model, backend="eager") if compiled else model
    assert_equal_models(run, twin)
    for each in (model, twin):
        write(each.model.layers[0].get_submodule(path))
    assert_equal_models(run, twin)
    assert_equal_models(unpatch_model(model), twin)


PARAMETRIZATIONS = {
    "weight norm": parametrizations.weight_norm,
    "old weight norm": torch.nn.utils.weight_norm,
    "pruning": lambda linear: prune.l1_unstructured(linear, "weight", amount=0.5),
    "own": lambda linear: parametrize.register_parametrization(linear, "weight", Double()),
}


class Halve(nn.Module):
    def forward(self, x):
        return x / 2


class Double(nn.Module):
    def forward(self, weight):
        return weight * 2


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", PARAMETRIZATIONS)
def test_parametrizations(name, when):
    twin = model_of()
    model = copy.deepcopy(twin)
    if when == "after":
        logits(patch_model(model))
    for each in (model, twin):
        PARAMETRIZATIONS[name](each.model.layers[0].mlp.down_proj)
    if when == "before":
        patch_model(model)
    assert_equal_models(model, twin)
    assert "model.layers.0.feedforward" in reasons(model)
    assert_equal_models(unpatch_model(model), twin)


def plus(h):
    h[:, -1] += 20


def plus_data(h):
    h.data[:, -1] += 20


def plus_numpy(h):
    h.detach().numpy()[:, -1] += 20


@pytest.mark.parametrize("write", [plus, plus_data, plus_numpy])
@pytest.mark.parametrize("grad", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("where", ["wrapper", "hook", "pre-hook", "compiled"])
def test_the_stream_written_to_between_layers(where, grad, write):
    if where == "compiled" and write is plus_numpy:
        pytest.skip("not for graphs")
    model, twin = twins("shared")
    for each in (model, twin):
        layer = each.model.layers[0]
        if where == "hook":
            layer.register_forward_hook(lambda _, inputs, output: write(output))
        elif where == "pre-hook":
            each.model.layers[1].register_forward_pre_hook(lambda _, inputs: write(inputs[0]))
        else:

            def wrapped(h, *arguments, forward=layer.forward, **named):
                h = forward(h, *arguments, **named)
                write(h)
                return h

            layer.forward = wrapped
    assert_equal_models(torch.compile(model, backend="eager") if where == "compiled" else model, twin, grad)


def test_replaced_parameters_are_freed():
    model = patch_model(model_of("aligned"))
    old = [weakref.ref(parameter) for parameter in model.model.layers.parameters()]
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
    gc.collect()
    assert not any(each() is not None for each in old)


@pytest.mark.parametrize("when", ["before", "after"])
def test_shared_memory_stays_shared(when):
    twin = model_of()
    model = copy.deepcopy(twin)
    if when == "after":
        patch_model(model)
    model.share_memory()
    if when == "before":
        with pytest.warns(UserWarning, match="its weights are in shared memory"):
            patch_model(model)
    assert_equal_models(model, twin)
    assert all(parameter.is_shared() for parameter in model.parameters())
    if when == "after":
        assert patch_report(model).fused == 7


def test_a_trainable_parameter_in_a_frozen_model():
    model = patch_model(model_of().requires_grad_(False))
    linear = model.model.layers[0].mlp.up_proj
    logits(model)
    linear.weight = nn.Parameter(linear.weight.detach().clone())
    model(IDS).logits.sum().backward()
    assert linear.weight.grad is not None


def test_the_report_tells_of_another_head():
    model = patch_model(model_of())
    model.resize_token_embeddings(104, mean_resizing=False)
    assert reasons(model)["lm_head"] == "one of its modules was replaced"
    model = patch_model(model_of())
    model.lm_head.__class__ = Linear
    assert "test_guards.Linear" in reasons(model)["lm_head"]


def test_quantised_linear_layers_stay_unfused():
    twin = model_of(attention_bias=False, mlp_bias=False)
    model = copy.deepcopy(twin)
    for each in (model, twin):
        each.model.layers[0].mlp.up_proj = Int8Linear(each.model.layers[0].mlp.up_proj)
        each.lm_head = Int8Linear(each.lm_head)
    patch_model(model)
    assert "Int8Linear, not a plain linear layer" in reasons(model)["lm_head"]
    assert_equal_models(model, twin)


def test_dropouts_that_are_on_in_evaluation():
    model, twin = twins("shared", "gpt2", resid_pdrop=0.5)
    for each in (model, twin):
        each.transformer.h[0].mlp.dropout.train()
    found = []
    for each in (model, twin):
        torch.manual_seed(0)
        found.append(logits(each))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("change", ["hook", "wrapped"])
def test_what_follows_the_output_projection_inside_an_attention(change, when):
    twin = model_of("shared", "gpt2")
    model = copy.deepcopy(twin)
    if when == "after":
        patch_model(model)
    for each in (model, twin):
        attention = each.transformer.h[1].attn
        if change == "wrapped":
            attention.resid_dropout = nn.Sequential(attention.resid_dropout, Halve())
        else:
            attention.resid_dropout.register_forward_hook(lambda _, inputs, output: output / 2)
    if when == "before":
        patch_model(model)
    assert "transformer.h.1.attention" in reasons(model)
    assert_equal_models(model, twin)


def test_an_instances_own_forward_from_before():
    twin = model_of()
    model = copy.deepcopy(twin)
    for each in (model, twin):
        layer = each.model.layers[0]
        layer.forward = types.MethodType(lambda self, h, *a, **k: type(self).forward(self, h * 1.25, *a, **k), layer)
    patch_model(model)
    assert reasons(model)["model.layers.0.attention"] == "the layer has a forward of its own"
    assert_equal_models(model, twin)


def replica(module):
    """As nn.DataParallel makes them, without its devices."""
    made = module._replicate_for_data_parallel()
    made._modules = {name: replica(child) for name, child in module._modules.items()}
    for name, parameter in module._parameters.items():
        made.__dict__[name] = None if parameter is None else parameter.detach() * 2
    return made


@pytest.mark.parametrize("plan", ["dense", "aligned"])
def test_replicas_run_their_own_weights(plan):
    model, twin = twins(plan)
    assert_equal_models(replica(model), replica(twin))
    assert_equal_models(model, twin)


def note(seen, model, module, positional, named):
    seen[model] = len(positional), set(named)


@pytest.mark.parametrize(
    "family", ["llama", "mistral", "mixtral", "opt", "phi", "phi3", "gpt2", "gpt-neox", "stablelm", "falcon-7b"]
)
@pytest.mark.parametrize("sliced", [False, True])
def test_attention_is_called_as_the_family_calls_it(family, sliced):
    twin = tiny_model(family)
    model = copy.deepcopy(twin)
    if sliced:
        model = slice_model(model, [tokens(4, 32)], sparsity=0, progress=False)
        patch_model(model, exclude=["model.layers.0.*"] if family == "llama" else [])
    seen = {}
    for each in (model, twin):
        for module in each.modules():
            if "Attention" in type(module).__name__:
                module.register_forward_pre_hook(partial(note, seen, each), with_kwargs=True)
                break
        logits(each)
    assert seen[model] == seen[twin]


def spoil_the_kernels(monkeypatch):
    def wrong(a, *arguments, **named):
        y, squares = residual_linear(a, *arguments, **named)
        return y * 1.1, squares

    monkeypatch.setattr(patched_layers, "residual_linear", wrong)


@pytest.mark.parametrize("plan", PLANS)
def test_what_differs_in_the_self_check_stays_unfused(plan, monkeypatch):
    twin = model_of(plan)
    model = copy.deepcopy(twin)
    spoil_the_kernels(monkeypatch)
    with pytest.warns(UserWarning, match="stays unfused: on a few tokens its result differs"):
        patch_model(model)
    assert patch_report(model).fused == 1
    assert_equal_models(model, twin)
    with pytest.raises(AssertionError):
        assert_equal_models(patch_model(unpatch_model(model), check=False), twin)
    assert "not checked: check=False" in str(patch_report(model))


def test_the_self_check_names_the_sublayer_that_differs(monkeypatch):
    twin = model_of()
    model = copy.deepcopy(twin)
    monkeypatch.setitem(patched_layers.GATED_ACTIVATIONS, type(model.model.layers[0].mlp.act_fn), "silu_gate")
    model.model.layers[1].mlp.gate_proj.weight.data.mul_(1e3)
    twin.load_state_dict(model.state_dict())
    original = patched_layers.FusedFeedForward.run

    def wrong(self, h, sumsq, layer_arguments):
        a, *others = original(self, h, sumsq, layer_arguments)
        return a.clamp(max=10), *others

    monkeypatch.setattr(patched_layers.FusedFeedForward, "run", wrong)
    with pytest.warns(UserWarning, match=r"model.layers.1.feedforward stays unfused"):
        patch_model(model)
    assert "model.layers.1.feedforward" in reasons(model)
    assert not any(name.endswith("attention") for name in reasons(model))
    assert_equal_models(model, twin)


def test_the_self_check_in_half_precision():
    for dtype in (torch.bfloat16, torch.float16):
        for family in ("llama", "mixtral", "phi", "gpt2"):
            model = slice_model(tiny_model(family), [tokens(4, 32)], sparsity=0, progress=False).to(dtype)
            assert patch_report(patch_model(model)).fused >= 4


def test_the_self_check_leaves_no_trace():
    model = model_of()
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    unpatch_model(patch_model(model.train()))
    assert model.training
    for name, module in model.named_modules():
        assert module.__dict__.keys() == before[name].keys()


def test_no_self_check_without_weights():
    model = model_of()
    model.model.layers[0].mlp.to("meta")
    assert "not checked: weights are absent" in str(patch_report(patch_model(model)))


def test_derivatives_forward():
    model, twin = twins()
    embeddings = torch.linspace(-1, 1, 4 * 48).view(1, 4, 48)
    found = []
    for each in (model, twin):
        each.requires_grad_(False).set_attn_implementation("eager")
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(embeddings, torch.ones_like(embeddings))
            found.append(forward_ad.unpack_dual(each(inputs_embeds=dual, use_cache=False).logits).tangent)
    torch.testing.assert_close(*found)


def test_vmap_and_jvp():
    model, twin = twins("shared")
    embeddings = torch.linspace(-1, 1, 2 * 4 * 32).view(2, 1, 4, 32)
    for each in (model, twin):
        each.requires_grad_(False).set_attn_implementation("eager")

    def run(each):
        return lambda x: each(inputs_embeds=x, use_cache=False).logits

    torch.testing.assert_close(torch.vmap(run(model))(embeddings), torch.vmap(run(twin))(embeddings))
    tangents = (torch.ones_like(embeddings[0]),)
    found = [torch.func.jvp(run(each), (embeddings[0],), tangents)[1] for each in (model, twin)]
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_exported_programs(strict):
    model, twin = twins("aligned")
    found = []
    for each in (model, twin):
        with torch.no_grad():
            program = torch.export.export(each, (IDS,), dict(use_cache=False), strict=strict)
        found.append(program)
    nodes = [[node.target for node in program.graph.nodes] for program in found]
    assert not any("slicegpt_fast" in str(target) for target in nodes[0])
    torch.testing.assert_close(found[0].module()(IDS, use_cache=False).logits, logits(twin))


def test_traced_graphs():
    model, twin = twins("shared")
    model.requires_grad_(False)
    with torch.no_grad():
        traced = torch.jit.trace(lambda ids: model(ids, use_cache=False).logits, (IDS,), check_trace=False)
        torch.testing.assert_close(traced(IDS), logits(twin))
        assert "slicegpt_fast::" not in str(traced.graph)


@pytest.mark.parametrize("plan", PLANS)
def test_dill(plan):
    dill = pytest.importorskip("dill")
    model = patch_model(model_of(plan))
    assert_equal_models(dill.loads(dill.dumps(model)), model)


def test_functional_calls():
    model, twin = twins("shared")
    weights = {name: value.detach() * 1.1 for name, value in model.named_parameters()}
    kept = {name: value.clone() for name, value in weights.items()}
    addresses = {name: value.data_ptr() for name, value in weights.items()}
    with torch.no_grad():
        found = [
            torch.func.functional_call(each, weights, (IDS,), dict(use_cache=False)).logits for each in (model, twin)
        ]
    torch.testing.assert_close(*found)
    assert all(torch.equal(weights[name], kept[name]) and weights[name].data_ptr() == addresses[name] for name in kept)
    assert_equal_models(model, twin)


def pickled(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


CHANGES = {
    "hook": lambda layer: layer.mlp.register_forward_hook(lambda _, inputs, output: output * 2),
    "class": lambda layer: setattr(layer.mlp, "__class__", MLP),
    "forward": lambda layer: setattr(layer.mlp, "forward", lambda x: x * 2),
    "bias": lambda layer: setattr(layer.mlp.down_proj, "bias", nn.Parameter(torch.ones(48))),
    "eps": lambda layer: setattr(layer.input_layernorm, "variance_epsilon", 5.0),
    "wrapped": lambda layer: setattr(layer, "mlp", Wrap(layer.mlp)),
    "cast": lambda layer: layer.bfloat16().float(),
}


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
def test_changes_after_compiling(change):
    """What a compiled unpatched model sees, a compiled patched one sees too."""
    model, twin = twins(attention_bias=False, mlp_bias=False, num_hidden_layers=2)
    compiled = [torch.compile(each, backend="eager") for each in (model, twin)]
    for each in compiled:
        logits(each)
    for each in (model, twin):
        CHANGES[change](each.model.layers[0])
    assert_equal_models(*compiled)


@pytest.mark.parametrize("how", [copy.deepcopy, pickled], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("change", CHANGES)
def test_changes_of_a_copy(change, how):
    model, twin = twins(attention_bias=False, mlp_bias=False)
    model = how(model)
    assert patch_report(model).fused == 7
    for each in (model, twin):
        CHANGES[change](each.model.layers[0])
    assert_equal_models(model, twin)


def adaption_prompt():
    return peft.AdaptionPromptConfig(adapter_len=4, adapter_layers=2, task_type="CAUSAL_LM")


ADAPTERS = {
    "AdaptionPrompt": adaption_prompt,
    "IA3": lambda: peft.IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], init_ia3_weights=False
    ),
    "OFT": lambda: peft.OFTConfig(target_modules=["q_proj"], oft_block_size=4, init_weights=False),
    "LNTuning": lambda: peft.LNTuningConfig(target_modules=["input_layernorm"]),
    "DoRA": lambda: peft.LoraConfig(r=2, target_modules=["up_proj"], use_dora=True, init_lora_weights=False),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_of_all_sorts(name, when):
    twin = model_of(attention_bias=False, mlp_bias=False)
    model = copy.deepcopy(twin)
    if when == "after":
        logits(patch_model(model))
    adapted = []
    for each in (model, twin):
        torch.manual_seed(0)
        adapted.append(peft.get_peft_model(each, ADAPTERS[name]()).eval())
        with torch.no_grad():
            for parameter in (p for p in each.parameters() if p.requires_grad):
                parameter.add_(0.1)
    if when == "before":
        patch_model(model)
    assert_equal_models(*adapted)
