"""Whole decode steps: the same logits and the same caches as layer by layer, in every conversation."""

import copy
import pickle
import threading

import pytest
import torch
from models import FAMILIES, LATER, tiny_model, tokens
from torch import nn
from transformers import DynamicCache, StaticCache

from slicegpt_fast import patch_model, patch_report, slice_model, unpatch_model
from slicegpt_fast.patching import steps

PLANS = {
    "shared": dict(basis="shared", sparsity=0.2),
    "per-norm": dict(basis="per-norm", sparsity=0.2),
    "truncated": dict(basis="per-norm", shortcut="aligned", shortcut_rank=5, sparsity=0.2),
    "cuts": dict(target_params=0.8),
}
# Families whose attention, or a layer's mixture of experts, a native step does not know.
WHOLE = {
    "biogpt",
    "cwm",
    "gpt-bigcode",
    "gpt-bigcode-heads",
    "internlm3",
    "iquestcoder",
    "ministral",
    "seed_oss",
    "starcoder2",
}
LAYER_BY_LAYER = {name for name in FAMILIES if name.startswith("falcon")} | {"mixtral", "phi"} | (LATER.keys() - WHOLE)
SLIDING = {"mistral", "ministral"}  # in all layers: steps know no static cache of that kind
CASES = [(family, "dense" if family in LAYER_BY_LAYER else "shared") for family in FAMILIES]
CASES += [("llama", plan) for plan in ("dense", "per-norm", "truncated", "cuts")]
CASES += [("qwen3", "cuts"), ("mistral", "cuts"), ("phi3", "cuts"), ("qwen3", "dense")]
DYNAMIC = [(*case, False) for case in CASES]
STATIC = [(*case, True) for case in CASES if "falcon" not in case[0]]  # whose own code takes no static cache


def model_of(family="llama", plan="shared", **overrides):
    model = tiny_model(family, **overrides)
    return model if plan == "dense" else slice_model(model, [tokens(4, 32)], **PLANS[plan], progress=False)


@pytest.fixture
def native(monkeypatch):
    """The number of tokens of each native call, one list per test."""
    calls = []
    run = steps.Program.run

    def counted(self, h, *others):
        calls.append(h.shape[1])
        return run(self, h, *others)

    monkeypatch.setattr(steps.Program, "run", counted)
    return calls


def patched(model, native, **options):
    """The patched model; what the check of patch_model called does not count."""
    patch_model(model, **options)
    native.clear()
    return model


def close(a, b):
    return bool((a - b).abs().max() <= 1e-5 * (b.max() - b.min()))


def caches_of(cache):
    return [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]


@torch.no_grad()
def conversation(model, cache, *, batch=2, padded=True, sizes=(20, 1, 1, 3, 1, 8, 1)):
    """The logits of tokens that come ``sizes`` at a time, and what the cache holds after each of them."""
    ids = tokens(batch, sum(sizes), seed=3)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :4] = 0
    found, start = [], 0
    for size in sizes:
        end = start + size
        logits = model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache).logits
        found.append((logits[mask[:, start:end].bool()], caches_of(cache)))
        start = end
    return found


def alike(given, expected, mask_out=4):
    for (logits, cache), (wanted, wanted_cache) in zip(given, expected, strict=True):
        assert close(logits, wanted)
        for pair, wanted_pair in zip(cache, wanted_cache, strict=True):
            for x, y in zip(pair, wanted_pair, strict=True):
                assert x.shape == y.shape
                assert close(x[1:], y[1:])  # the first sequence is padded: its first positions count nowhere


@pytest.mark.parametrize(("family", "plan", "static"), [*DYNAMIC, *STATIC])
def test_same_logits_and_caches(family, plan, static, native):
    model = model_of(family, plan)

    def cache():
        if static:
            return StaticCache(config=model.config, max_cache_len=48)
        return DynamicCache(config=model.config)

    expected = conversation(model, cache())
    patched(model, native)
    alike(conversation(model, cache()), expected)
    whole = [] if family in LAYER_BY_LAYER or (static and family in SLIDING) else [1, 1, 3, 1, 8, 1]
    runs = {"qwen3-moe": 2, "cwm": 1 if static else 3}.get(family, 1)  # around a layer with experts, of one kind
    assert native == [size for size in whole for _ in range(runs)]
    native.clear()
    alike(conversation(unpatch_model(model), cache()), expected)
    assert not native


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_short_prompts_are_steps_too(family, native):
    model = model_of(family)
    expected = conversation(model, DynamicCache(), padded=False, sizes=(5, 1, 4))
    patched(model, native)
    alike(conversation(model, DynamicCache(), padded=False, sizes=(5, 1, 4)), expected)
    assert native == [5, 1, 4]


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_the_last_token_of_a_long_conversation(family, native):
    """More positions than one chunk of the kernel, and room that grows twice."""
    model = model_of(family, max_position_embeddings=700)
    sizes = (200, *[1] * 60, 16, 300, 1)
    expected = conversation(model, DynamicCache(), batch=1, padded=False, sizes=sizes)
    patched(model, native)
    given = conversation(model, DynamicCache(), batch=1, padded=False, sizes=sizes)
    assert all(close(a[0], b[0]) for a, b in zip(given, expected, strict=True))
    assert len(native) == 62


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("plan", ["dense", "shared", "truncated"])
def test_half_precision_is_as_good_as_unpatched(plan, dtype, native):
    exact = model_of(plan=plan).double()
    expected = conversation(exact, DynamicCache())
    model = exact.to(dtype)
    by_torch = conversation(model, DynamicCache())
    exact_again = [logits for logits, _ in expected]
    patched(model, native)
    given = conversation(model, DynamicCache())
    assert native
    for x, y, z in zip(given, by_torch, exact_again, strict=True):
        error, allowed = ((logits.double() - z).norm() for logits in (x[0], y[0]))
        assert error <= 2 * allowed


def test_threads_change_no_bit(native):
    model = patched(model_of(), native)
    found, before = [], torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(conversation(model, DynamicCache(), sizes=(8, 1, 1)))
    torch.set_num_threads(before)
    assert len(native) == 9
    for other in found[1:]:
        assert all(torch.equal(x[0], y[0]) for x, y in zip(other, found[0], strict=True))


def advance(model, cache, seed, size=1):
    with torch.no_grad():
        return model(tokens(2, size, seed=seed), past_key_values=cache).logits


CHANGES = {
    "cropped": lambda cache: cache.crop(-2),
    "repeated": lambda cache: (cache.batch_repeat_interleave(2), cache.batch_select_indices(torch.tensor([0, 2]))),
    "reordered": lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
    "copied": lambda cache: copy.deepcopy(cache),
    "written into": lambda cache: [layer.keys.mul_(0.5) for layer in cache.layers],
    "put together anew": lambda cache: DynamicCache([(layer.keys, layer.values) for layer in cache.layers]),
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_who_else_changes_the_cache(change, native):
    def talk(model):
        cache = DynamicCache()
        logits = [advance(model, cache, seed) for seed in range(4)]
        changed = CHANGES[change](cache)
        cache = changed if isinstance(changed, DynamicCache) else cache
        return logits + [advance(model, cache, seed) for seed in range(4, 8)]

    model = model_of()
    expected = talk(model)
    patched(model, native)
    given = talk(model)
    assert len(native) == 8
    assert all(close(x, y) for x, y in zip(given, expected, strict=True))


def test_what_a_cache_handed_out_stays_as_it_was(native):
    model = patched(model_of(), native)
    cache = DynamicCache()
    advance(model, cache, 0, size=6)
    handed_out = [(layer.keys, layer.values) for layer in cache.layers]
    before = caches_of(cache)
    cache.crop(-3)
    for seed in range(5):
        advance(model, cache, seed)
    assert len(native) == 6
    for pair, as_it_was in zip(handed_out, before, strict=True):
        assert all(map(torch.equal, pair, as_it_was))


def test_two_conversations_in_turn(native):
    model = model_of()
    separately = []
    for seed in (0, 10):
        cache = DynamicCache()
        separately.append([advance(model, cache, seed + i) for i in range(3)])
    patched(model, native)
    caches = [DynamicCache(), DynamicCache()]
    in_turn = [[], []]
    for i in range(3):
        for which, seed in enumerate((0, 10)):
            in_turn[which].append(advance(model, caches[which], seed + i))
    assert len(native) == 6
    assert all(close(x, y) for a, b in zip(in_turn, separately, strict=True) for x, y in zip(a, b, strict=True))


def hook(module):
    module.register_forward_hook(lambda module, arguments, output: output * 1.5)


def other_forward(module):
    forward = module.forward
    module.forward = lambda *positional, **named: forward(*positional, **named) * 1.5


CHANGED = {
    "a hook on a layer": lambda model: hook(model.model.layers[1]),
    "a hook on a projection": lambda model: hook(model.model.layers[2].mlp.down_proj),
    "a layer's forward": lambda model: other_forward(model.model.layers[1]),
    "fewer layers": lambda model: setattr(model.config, "num_hidden_layers", 2),
    "a shorter list of layers": lambda model: setattr(model.model, "layers", model.model.layers[:2]),
    "the epsilon": lambda model: setattr(model.model.layers[1].input_layernorm, "eps", 0.5),
    "the scale": lambda model: setattr(model.model.layers[1].self_attn, "scaling", 0.1),
    "a weight": lambda model: model.model.layers[1].mlp.down_proj.weight.data.mul_(1.5),
    "another weight": lambda model: setattr(
        model.model.layers[1].self_attn.o_proj.weight,
        "data",
        model.model.layers[1].self_attn.o_proj.weight.data * 1.5,
    ),
    "the attention": lambda model: model.set_attn_implementation("eager"),
}


def layer_of(model):
    return model.model.layers[1]


CHANGED_NORMS = {
    "epsilon": lambda model: setattr(layer_of(model).input_layernorm, "variance_epsilon", 0.5),
    "weight": lambda model: setattr(layer_of(model).post_attention_layernorm, "weight", nn.Parameter(torch.rand(48))),
    "data": lambda model: setattr(layer_of(model).input_layernorm.weight, "data", torch.rand(96)[::2]),
    "epsilon of queries": lambda model: setattr(layer_of(model).self_attn.q_norm, "variance_epsilon", 0.5),
    "epsilons of both": lambda model: [
        setattr(getattr(layer_of(model).self_attn, name), "variance_epsilon", 0.5) for name in ("q_norm", "k_norm")
    ],
    "weight of keys": lambda model: setattr(layer_of(model).self_attn.k_norm, "weight", nn.Parameter(torch.rand(12))),
    "data of queries": lambda model: setattr(layer_of(model).self_attn.q_norm.weight, "data", torch.rand(12)),
    "written into": lambda model: layer_of(model).self_attn.q_norm.weight.data.mul_(2),
}


@pytest.mark.parametrize("change", CHANGED_NORMS)
def test_a_changed_norm_does_what_it_says(change, native):
    model = model_of("qwen3", "dense")
    untouched = copy.deepcopy(model)
    patched(model, native)
    advance(model, DynamicCache(), 0)
    assert native == [1]
    for each in (model, untouched):
        torch.manual_seed(0)
        CHANGED_NORMS[change](each)
    cache, plain = DynamicCache(), DynamicCache()
    for seed in range(3):
        assert close(advance(model, cache, seed), advance(untouched, plain, seed))


@pytest.mark.parametrize("change", CHANGED)
def test_a_changed_model_does_what_it_says(change, native):
    model = model_of()
    cache = DynamicCache()
    untouched = copy.deepcopy(model)
    patched(model, native)
    advance(model, cache, 0)
    assert native
    CHANGED[change](model)
    CHANGED[change](untouched)
    cache, plain = DynamicCache(), DynamicCache()
    for seed in range(3):
        assert close(advance(model, cache, seed), advance(untouched, plain, seed))


@torch.no_grad()
def test_hidden_states_are_those_of_each_layer(native):
    model = model_of()
    ids = tokens(1, 4)
    expected = model(ids, output_hidden_states=True)
    patched(model, native)
    given = model(ids, output_hidden_states=True)
    assert not native
    assert all(close(x, y) for x, y in zip(given.hidden_states, expected.hidden_states, strict=True))
    model(ids)  # the hooks that transformers hung on the layers stay there
    assert native == [4]


@torch.no_grad()
def test_no_cache_and_autograd_go_layer_by_layer(native):
    model = patched(model_of(), native)
    model(tokens(1, 4), use_cache=False)
    with torch.enable_grad():
        model(tokens(1, 4))
    assert not native


@pytest.mark.parametrize("cache_type", [DynamicCache, StaticCache])
def test_in_and_out_of_inference_mode(cache_type, native):
    model = model_of()
    ids = tokens(1, 100)
    options = dict(config=model.config) | (dict(max_cache_len=128) if cache_type is StaticCache else {})
    with torch.no_grad():
        expected = model(ids).logits[:, -1]
    patched(model, native)
    for first, second in ((torch.inference_mode, torch.no_grad), (torch.no_grad, torch.inference_mode)):
        cache = cache_type(**options)
        with torch.no_grad():  # a static cache writes into what it makes here
            model(ids[:, :2], past_key_values=cache)
        for mode, start, end in ((first, 2, 10), (second, 10, 15), (first, 15, 31), (second, 31, 99), (first, 99, 100)):
            with mode():
                logits = model(ids[:, start:end], past_key_values=cache).logits
        assert close(logits[:, -1], expected)
    assert native == ([2, 8, 5, 16, 1] * 2 if cache_type is DynamicCache else [8, 5, 16, 1] * 2)  # no mask at first


def test_copies_and_pickles_step_for_themselves(native, tmp_path):
    model = model_of()
    expected = [x for x, _ in conversation(model, DynamicCache())]
    patched(model, native)
    conversation(model, DynamicCache())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        native.clear()
        given = conversation(other, DynamicCache())
        assert native
        assert all(close(x[0], y) for x, y in zip(given, expected, strict=True))


def test_threads_of_python(native):
    model = model_of()
    expected = conversation(model, DynamicCache())
    patched(model, native)
    results = {}

    def talk(name):
        results[name] = conversation(model, DynamicCache())

    workers = [threading.Thread(target=talk, args=(name,)) for name in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for given in results.values():
        alike(given, expected)


def test_the_report_says_what_runs_whole(monkeypatch):
    model = patch_model(model_of())
    assert patch_report(model).steps == "decode steps of layers 0-2 in one native call each"
    model.set_attn_implementation("eager")
    assert "layer by layer: the attention implementation is 'eager'" in str(patch_report(model))
    model.set_attn_implementation("sdpa")
    monkeypatch.setenv("SLICEGPT_FAST_BACKEND", "reference")
    assert "backend 'reference' was asked for" in patch_report(model).steps
    partly = patch_model(model_of(), exclude=["model.layers.1.feedforward"])
    monkeypatch.delenv("SLICEGPT_FAST_BACKEND")
    assert patch_report(partly).steps == (
        "decode steps of layers 0-0, 2-2 in one native call each; layer 1: not all of it is fused"
    )
    assert "its attention is not the one of the op attend" in patch_report(patch_model(model_of("falcon-7b"))).steps


def test_runs_between_unfused_layers(native):
    model = model_of()
    expected = conversation(model, DynamicCache())
    patched(model, native, exclude=["model.layers.1.*"])
    alike(conversation(model, DynamicCache()), expected)
    assert len(native) == 12


def test_layers_of_two_types(native):
    """Sliding windows and full attention have masks of their own: each run of a type is a call."""
    types = ["sliding_attention", "full_attention", "full_attention"]
    model = model_of("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=1, layer_types=types)
    expected = conversation(model, DynamicCache(config=model.config))
    patched(model, native)
    alike(conversation(model, DynamicCache(config=model.config)), expected)
    assert len(native) == 12


def test_a_step_that_differs_is_refused(monkeypatch):
    model = model_of()
    run = steps.Program.run
    monkeypatch.setattr(steps.Program, "run", lambda self, *arguments: run(self, *arguments).roll(1, -1))
    with pytest.warns(UserWarning, match="decode steps"):
        patch_model(model)
    assert "on a few tokens its result differs" in patch_report(model).steps
