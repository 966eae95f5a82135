"""A patched model computes what it computed before, and gives everything back when it is unpatched."""

import copy
import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from models import FAMILIES, ONE_WIDTH, VOCABULARY, sparse_layers, tiny_model, tokens
from torch import nn
from transformers import AutoModelForCausalLM, BertConfig, BertModel, StaticCache

from slicegpt_fast import (
    InputError,
    export_plain,
    load_model,
    patch_model,
    patch_report,
    save_model,
    slice_model,
    unpatch_model,
)
from slicegpt_fast.architectures import Decoder
from slicegpt_fast.ops.dispatch import OPS, Op, Request
from slicegpt_fast.patching import op_requests
from slicegpt_fast.patching.head import FusedHead
from slicegpt_fast.patching.layers import FusedSublayer, normalised

PLANS = {
    "shared": dict(basis="shared"),
    "per-norm": dict(basis="per-norm"),
    "aligned": dict(basis="per-norm", shortcut="aligned"),
    "truncated": dict(basis="per-norm", shortcut="aligned", shortcut_rank=5),
    "rank 0": dict(basis="per-norm", shortcut="aligned", shortcut_rank=0),
}
UNEVEN = {
    "uneven": dict(basis="per-norm", widths=[36, 40, 44, 40, 36, 40, 44]),
    "uneven, aligned": dict(basis="per-norm", shortcut="aligned", widths=[36, 36, 40, 40, 44, 44, 48]),
}
CASES = [(family, plan) for family in FAMILIES for plan in ("dense", *PLANS)]
CASES += [(family, plan) for family in ("llama", "phi3", "opt") for plan in UNEVEN]
BACKENDS = ("reference", "auto")


def model_of(family="llama", plan="per-norm", **overrides):
    model = tiny_model(family, **overrides)
    if plan == "dense":
        return model
    one_width = dict(widths=[40] * len(Decoder(model).sites))
    size = one_width if family in ONE_WIDTH and plan != "shared" else dict(sparsity=0.2)
    options = UNEVEN[plan] if plan in UNEVEN else PLANS[plan] | size
    return slice_model(model, [tokens(4, 32)], **options, progress=False)


@torch.no_grad()
def logits(model, ids, **arguments):
    return model(ids, **arguments).logits


def close(a, b):
    return (a - b).abs().max() <= 1e-5 * (b.max() - b.min())


@pytest.fixture
def model():
    return model_of()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("family", "plan"), CASES)
def test_same_logits_and_back_again(family, plan, backend):
    model = model_of(family, plan)
    ids, one = tokens(2, 19, seed=1), tokens(2, 1, seed=2)
    before = logits(model, ids), logits(model, one)
    state = {name: (value.shape, value.dtype) for name, value in model.state_dict().items()}

    assert patch_model(model, backend=backend) is model
    report = patch_report(model)
    assert report.fused == len(report.rows) - (3 if family == "bitnet" else sparse_layers(model))  # a norm between
    assert {name: (value.shape, value.dtype) for name, value in model.state_dict().items()} == state
    assert close(logits(model, ids), before[0])
    assert close(logits(model, one), before[1])

    unpatch_model(model)
    assert torch.equal(logits(model, ids), before[0])
    assert torch.equal(logits(model, one), before[1])
    assert not any("forward" in m.__dict__ for m in model.modules() if isinstance(m, nn.Linear))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("plan", ["dense", "shared", "per-norm", "truncated"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_as_good_as_unpatched(dtype, plan, backend):
    """Against fp64 logits of the same weights: the largest error is at most twice the unpatched model's."""
    model = model_of("qwen2", plan).to(dtype)
    for ids in (tokens(4, 33, seed=1), tokens(3, 1, seed=2)):
        exact = logits(copy.deepcopy(model).double(), ids)
        unpatched = (logits(model, ids).double() - exact).abs().max()
        patched = logits(patch_model(model, backend=backend), ids)
        unpatch_model(model)
        assert patched.dtype == dtype
        rounding = torch.finfo(dtype).eps * (exact.max() - exact.min())
        assert (patched.double() - exact).abs().max() <= 2 * unpatched + rounding


@pytest.mark.parametrize("plan", ["dense", "shared", "aligned"])
def test_the_weights_are_views_and_add_no_memory(plan):
    model = model_of(plan=plan)
    patch_model(model)
    layer = model.model.layers[0]
    queries, keys = layer.self_attn.q_proj.weight, layer.self_attn.k_proj.weight
    gate, up = layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight
    assert keys.data_ptr() == queries.data_ptr() + queries.nbytes
    assert up.data_ptr() == gate.data_ptr() + gate.nbytes
    matrices = [
        packed.matrix
        for fused in model._slicegpt_fast_patch.layers
        for sublayer in fused.sublayers.values()
        for branch in sublayer.branches
        for packed in (branch.reader, branch.writer)
    ]
    storages = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    assert len(matrices) == 12
    assert all(matrix.untyped_storage().data_ptr() in storages for matrix in matrices)
    unpatch_model(model)
    assert keys.data_ptr() != queries.data_ptr() + queries.nbytes


@pytest.mark.parametrize("plan", ["dense", "per-norm", "aligned"])
def test_pickles_of_a_patched_model_are_patched(plan, tmp_path):
    model = patch_model(model_of(plan=plan))
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    ids = tokens(2, 9)
    assert torch.equal(logits(again, ids), logits(model, ids))
    assert patch_report(again) == patch_report(model)
    assert torch.equal(logits(unpatch_model(again), ids), logits(unpatch_model(model), ids))


@pytest.mark.parametrize("plan", ["dense", "aligned"])
def test_writing_into_a_parameters_data_is_seen(plan):
    """As adapters do when they are merged: neither a version nor an address tells of it."""
    model = patch_model(model_of(plan=plan))
    ids = tokens(2, 9)
    before = logits(model, ids)
    for name, parameter in model.named_parameters():
        if name.endswith(("q_proj.weight", "layernorm.weight", "down.weight", "up_proj.weight")):
            parameter.data += 0.05
    after = logits(model, ids)
    assert not close(after, before)
    assert close(after, logits(unpatch_model(model), ids))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", ["llama", "mistral", "phi", "gpt2", "falcon-7b"])
@torch.no_grad()
def test_generation(family, backend):
    """Greedy, beam, sampled, assisted; left padding; dynamic and static caches."""
    model = model_of(family, "shared")
    ids, mask = tokens(2, 9, seed=1), torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    ways = {
        "greedy": dict(),
        "static": dict(cache_implementation="static"),
        "no cache": dict(use_cache=False),
        "beam": dict(num_beams=3),
        "lookup": dict(prompt_lookup_num_tokens=3),
        "sampled": dict(do_sample=True, top_k=7),
    }
    if family == "falcon-7b":
        del ways["static"]  # its own cache code cannot

    def texts():
        found = {}
        for way, options in ways.items():
            torch.manual_seed(0)
            rows = slice(1, 2) if way == "lookup" else slice(None)
            options = dict(do_sample=False, pad_token_id=0, max_new_tokens=12) | options
            found[way] = model.generate(ids[rows], attention_mask=mask[rows], **options).tolist()
        return found

    expected = texts()
    patch_model(model, backend=backend)
    assert texts() == expected


def test_assisted_generation(model):
    assistant = model_of(plan="shared")
    ids = tokens(1, 9)
    options = dict(do_sample=False, max_new_tokens=12, pad_token_id=0)
    expected = model.generate(ids, **options)
    patch_model(model)
    patch_model(assistant)
    assert torch.equal(model.generate(ids, assistant_model=assistant, **options), expected)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attentions_and_hidden_states(implementation):
    model = model_of()
    model.set_attn_implementation(implementation)
    ids = tokens(2, 9)
    asked = dict(output_hidden_states=True, output_attentions=implementation == "eager")
    with torch.no_grad():
        expected = model(ids, **asked)
        patch_model(model)
        given = model(ids, **asked)
        assert patch_report(model).fused == len(patch_report(model).rows)  # transformers' own hooks do not count
    assert len(given.hidden_states) == len(expected.hidden_states)
    for a, b in zip(given.hidden_states, expected.hidden_states, strict=True):
        assert close(a, b)
    for a, b in zip(given.attentions or (), expected.attentions or (), strict=True):
        assert close(a, b)


@pytest.mark.parametrize(
    ("family", "plan"), [("llama", "truncated"), ("phi", "shared"), ("gpt2", "shared"), ("falcon-rw", "truncated")]
)
def test_compiles_without_a_graph_break(family, plan):
    model = model_of(family, plan)
    ids = tokens(2, 9)
    expected = logits(model, ids)
    patch_model(model, backend="reference")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert close(logits(compiled, ids), expected)


CHANGES = {
    "loaded": lambda model, other: model.load_state_dict(other.state_dict()) and model,
    "assigned": lambda model, other: model.load_state_dict(other.state_dict(), assign=True) and model,
    "copied": lambda model, other: copy.deepcopy(model),
    "moved": lambda model, other: model.double().float(),
    "to bf16": lambda model, other: model.bfloat16(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_compiling_after_a_change(change):
    """The first run after it is the compiled one."""
    plan = "dense" if change in ("assigned", "moved") else "aligned"
    ids, other = tokens(2, 9), model_of(plan=plan, num_hidden_layers=2)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.9)
    model = patch_model(model_of(plan=plan, num_hidden_layers=2))
    logits(model, ids)
    model = CHANGES[change](model, other).eval()
    if change == "copied":
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight.mul_(2)
    compiled = logits(torch.compile(model, fullgraph=True, backend="eager"), ids)
    expected = logits(model, ids)
    assert torch.equal(expected, compiled)
    unpatched = logits(unpatch_model(model), ids)
    assert (expected - unpatched).abs().max() <= (0.05 if change == "to bf16" else 1e-5) * unpatched.abs().max()


@torch.no_grad()
def test_compiled_decoding_with_a_static_cache(model):
    ids, following = tokens(2, 9), tokens(2, 1)
    whole = logits(model, torch.cat((ids, following), 1))[:, -1:]
    patch_model(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    cache = StaticCache(model.config, max_cache_len=16)
    compiled(ids, past_key_values=cache)
    assert close(compiled(following, past_key_values=cache).logits, whole)


def is_plain(model, ids):
    """True where the model gives exactly what it gives without a patch."""
    with torch.no_grad():
        patched = model(ids).logits
        original = copy.deepcopy(model)
        return torch.equal(unpatch_model(original)(ids).logits, patched)


def test_training_falls_back_and_gradients_are_right(model):
    ids = tokens(2, 9)
    model(ids, labels=ids).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    for mode in (True, False):
        patch_model(model.train(mode))
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, expected[name])
    assert patch_report(model.train()).fused == 0
    assert "training mode" in str(patch_report(model))


def test_an_optimizer_step_reaches_the_packed_weights():
    for plan in ("dense", "truncated"):
        model = patch_model(model_of(plan=plan))
        ids = tokens(2, 9)
        logits(model, ids)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        patched = logits(model, ids)
        assert close(patched, logits(unpatch_model(model), ids))


@pytest.mark.parametrize(
    "where", ["self_attn", "self_attn.q_proj", "self_attn.o_proj", "mlp", "mlp.act_fn", "input_layernorm"]
)
def test_a_hook_is_honoured(where):
    model = patch_model(model_of())
    seen, ids = [], tokens(2, 9)
    handle = (
        model.model.layers[1].get_submodule(where).register_forward_hook(lambda _, inputs, output: seen.append(inputs))
    )
    patched = logits(model, ids)
    report = patch_report(model)
    assert len(seen) == 1
    assert report.fused == len(report.rows) - 1
    assert "a hook on one of its modules" in str(report)
    handle.remove()
    assert patch_report(model).fused == len(report.rows)
    assert close(logits(model, ids), patched)
    assert len(seen) == 1


@pytest.mark.parametrize("grad", [torch.no_grad, torch.inference_mode])
def test_a_layer_hook_may_change_the_stream_in_place(model, grad):
    ids = tokens(2, 9)
    model.model.layers[0].register_forward_hook(lambda _, inputs, output: output.mul_(3))
    with grad():
        expected = model(ids).logits
        assert close(patch_model(model)(ids).logits, expected)


@pytest.mark.parametrize("plan", ["dense", "shared"])
def test_adapters(plan):
    from peft import LoraConfig, get_peft_model

    model = patch_model(model_of(plan=plan))
    ids = tokens(2, 9)
    before = logits(model, ids)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    adapted.eval()
    patched = logits(adapted, ids)
    assert patch_report(model).fused == 1
    assert "replaced" in str(patch_report(model))
    assert close(patched, logits(adapted.merge_and_unload(), ids))
    assert patch_report(model).fused == 7
    merged = logits(model, ids)
    assert not close(merged, before)
    assert close(merged, logits(unpatch_model(model), ids))
    assert close(merged, patched)


@pytest.mark.parametrize("plan", ["dense", "shared", "aligned"])
def test_adapters_merged_before_the_model_ran_with_them(plan):
    from peft import LoraConfig, get_peft_model

    model = patch_model(model_of(plan=plan))
    ids = tokens(2, 9)
    before = logits(model, ids)
    targets = ["k_proj", "up_proj", *(["down"] if plan == "aligned" else [])]
    config = LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    merged = get_peft_model(model, config).merge_and_unload().eval()
    after = logits(merged, ids)
    assert patch_report(model).fused == 7
    assert not close(after, before)
    assert close(after, logits(unpatch_model(model), ids))


def test_the_report_heeds_the_environment(model, monkeypatch):
    patch_model(model)
    assert {row.decode for row in patch_report(model).rows} == {"cpu"}
    monkeypatch.setenv("SLICEGPT_FAST_BACKEND", "reference")
    assert {row.decode for row in patch_report(model).rows} == {"reference"}


def test_a_gpu_of_which_nothing_is_known_keeps_torchs_own_path(model, monkeypatch):
    """The reference of an op is no faster than the module that it would replace."""
    known = {}
    on_gpu = Request("norm_linear", torch.device("cuda", 0), torch.float32, "decode", (1, 8, 8))
    for part in (FusedSublayer, FusedHead):
        monkeypatch.setattr(part, "requests", lambda self: [(on_gpu, None)])
    choose = Op.choose
    monkeypatch.setattr(
        Op, "choose", lambda *asked: known.get(asked[1], "reference") if asked[2] is on_gpu else choose(*asked)
    )
    ids = tokens(2, 9)
    before = logits(model, ids)
    with pytest.warns(UserWarning, match="no decoder layer was patched: no kernel is known to be faster on this GPU"):
        patch_model(model)
    assert {row.reason for row in patch_report(model).rows} == {
        "no kernel is known to be faster on this GPU: run slicegpt-fast tune"
    }
    assert torch.equal(logits(model, ids), before)
    unpatch_model(model)
    assert patch_report(patch_model(model, backend="reference")).fused == 7  # as asked for
    unpatch_model(model)
    known["auto"] = "cuda"
    assert patch_report(patch_model(model)).fused == 7


def test_adapters_that_were_there_before(model):
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False)).eval()
    ids = tokens(2, 9)
    expected = logits(adapted, ids)
    patch_model(model)
    assert patch_report(model).fused == 4
    assert close(logits(adapted, ids), expected)


def test_moving_and_loading_after_patching(model, tmp_path):
    ids = tokens(2, 9)
    other = model_of()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.9)
    patch_model(model)
    logits(model, ids)
    model.load_state_dict(other.state_dict())
    assert close(logits(model, ids), logits(other, ids))
    model.half()
    assert logits(model, ids).dtype == torch.float16
    assert close(logits(model.float(), ids), logits(copy.deepcopy(unpatch_model(copy.deepcopy(model))), ids))


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
def test_saving(family, tmp_path):
    model = model_of(family, "shared")
    save_model(model, tmp_path / "before")
    patch_model(model)
    model.save_pretrained(tmp_path / "hf")
    save_model(model, tmp_path / "ours")
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "before").state_dict()
    for folder in ("hf", "ours"):
        loaded = load_model(tmp_path / folder).state_dict()
        assert loaded.keys() == expected.keys()
        assert all(torch.equal(loaded[name], expected[name]) for name in expected)


def test_a_plain_export(tmp_path):
    export_plain(model_of(plan="shared"), tmp_path / "plain")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    ids = tokens(2, 9)
    expected = logits(model, ids)
    patch_model(model)
    assert patch_report(model).fused == 7
    assert close(logits(model, ids), expected)


def test_no_rows_for_the_head(model):
    patch_model(model.requires_grad_(False))
    for keep in (torch.tensor([], dtype=torch.long), slice(0, 0)):
        assert model(tokens(2, 9), logits_to_keep=keep).logits.shape == (2, 0, VOCABULARY)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_of_other_tensors_stays_as_it_is(dtype):
    class Quantised(torch.Tensor):
        pass

    model = tiny_model(dtype=dtype)
    expected = logits(model, tokens(2, 9))
    weight = model.lm_head.weight.detach().as_subclass(Quantised)
    model.lm_head.weight = nn.Parameter(weight, requires_grad=False)
    report = patch_report(patch_model(model))
    assert report.rows[-1].reason == "its weight is quantised or no parameter of it"
    assert report.fused == 6
    assert torch.equal(logits(unpatch_model(model), tokens(2, 9)), expected)


def test_a_copy_is_patched_for_itself(model):
    ids = tokens(2, 9)
    patch_model(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(0.9)
    patched = logits(twin, ids)
    assert close(patched, logits(unpatch_model(twin), ids))
    assert patch_report(model).fused == 7
    assert close(logits(model, ids), logits(unpatch_model(model), ids))


def test_only_this_instance(model):
    from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, LlamaMLP

    classes = (LlamaAttention, LlamaDecoderLayer, LlamaMLP, nn.Linear)
    forwards = [c.forward for c in classes]
    other = model_of()
    expected = logits(other, tokens(2, 9))
    patch_model(model)
    assert [c.forward for c in classes] == forwards
    assert not any("forward" in m.__dict__ for m in other.modules() if isinstance(m, nn.Linear))
    assert torch.equal(logits(other, tokens(2, 9)), expected)


def test_a_patched_model_can_be_freed():
    model = patch_model(model_of())
    weight = weakref.ref(model.model.layers[0].mlp.up_proj.weight)
    del model
    gc.collect()
    assert weight() is None


def test_two_threads(model):
    """One in fallback, one fused, on the same layers at the same time."""
    from concurrent.futures import ThreadPoolExecutor

    ids = tokens(2, 9)
    patch_model(model)
    expected = logits(model, ids)
    with ThreadPoolExecutor(2) as pool:
        fused = [pool.submit(logits, model, ids) for _ in range(40)]
        unfused = [pool.submit(lambda: model(ids).logits.detach()) for _ in range(40)]
        assert all(close(future.result(), expected) for future in (*fused, *unfused))


def test_include_and_exclude(model):
    patch_model(model, include=["*.attention", "lm_head"], exclude=["model.layers.1.*"])
    fused = [row.layer for row in patch_report(model).rows if row.reason is None]
    assert fused == ["model.layers.0.attention", "model.layers.2.attention", "lm_head"]
    ids = tokens(2, 9)
    assert close(logits(model, ids), logits(unpatch_model(model), ids))


def test_patching_twice(model):
    patch_model(model, exclude=["lm_head"])
    forward = model.model.layers[0].forward
    assert patch_model(model, exclude=["lm_head"]) is model
    assert model.model.layers[0].forward == forward
    with pytest.raises(InputError, match="already patched with other options: call unpatch_model first"):
        patch_model(model)
    unpatch_model(unpatch_model(model))
    patch_model(model)


def test_nothing_to_patch():
    class Own(nn.LayerNorm):
        """Nobody knows what it computes."""

    model = tiny_model("phi")
    for layer in model.model.layers:
        layer.input_layernorm = Own(48)
    with pytest.warns(UserWarning, match="no decoder layer was patched: "):
        patch_model(model, exclude=["lm_head"])
    with pytest.raises(InputError, match="no decoder layer was patched"):
        patch_model(unpatch_model(model), exclude=["lm_head"], strict=True)


@pytest.mark.parametrize(
    ("spoil", "options", "message"),
    [
        (lambda model: nn.Linear(2, 2), {}, "must be a transformers causal language model, not Linear"),
        (lambda model: tiny_bert(), {}, "model type 'bert' cannot be sliced: it is an encoder"),
        (lambda model: model.double(), {}, "dtype torch.float64; the ops take float32, float16, bfloat16"),
        (lambda model: model, dict(backend="gpu"), "argument backend is 'gpu'"),
        (lambda model: model, dict(backend="cuda"), "backend 'cuda' cannot run norm_linear"),
        (lambda model: model, dict(include="lm_head"), "argument include is .lm_head.; pass a list"),
        (lambda model: model, dict(exclude=["model.layers.9.*"]), "no part of the model is called 'model.layers.9.*'"),
    ],
)
def test_wrong_arguments(model, spoil, options, message):
    spoiled = spoil(model)
    with pytest.raises(InputError, match=message.replace("*", r"\*")):
        patch_model(spoiled, **options)
    assert "_slicegpt_fast_patch" not in spoiled.__dict__


def tiny_bert():
    sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=VOCABULARY)
    return BertModel(BertConfig(**sizes))


def test_a_report_needs_a_patch(model):
    with pytest.raises(InputError, match="not patched: call patch_model first"):
        patch_report(model)


def test_a_layer_on_two_devices(model):
    elsewhere = SimpleNamespace(device=torch.device("cuda:1"))  # stands in for a parameter of a second device
    layer = model.model.layers[1]
    layer.parameters = lambda: [*nn.Module.parameters(layer), elsewhere]
    with pytest.raises(InputError, match=r"model.layers.1 has weights on cpu and cuda:1: move each decoder layer"):
        patch_model(model)


@pytest.mark.parametrize(
    ("family", "plan"),
    [
        *(("llama", plan) for plan in ("dense", *PLANS, *UNEVEN)),
        ("phi", "aligned"),
        ("opt", "per-norm"),
        ("mixtral", "dense"),
    ],
)
def test_requests_are_what_the_layers_ask_for(family, plan, monkeypatch):
    """The report and `slicegpt-fast tune` go by them."""
    model, asked = model_of(family, plan), set()
    for op in OPS.values():

        def request(*arguments, ask=op.request):
            asked.add(ask(*arguments))
            return ask(*arguments)

        monkeypatch.setattr(op, "_plans", {})
        monkeypatch.setattr(op, "request", request)

    def of(request):
        return request.op, request.regime, request.shape[1:], request.epilogue

    expected = {of(request) for pair in op_requests(model) for request in pair if request is not None}
    patch_model(model, backend="reference")
    for ids in (tokens(1, 1), tokens(2, 50)):
        logits(model, ids)
    assert {of(request) for request in asked} == expected


def test_offloaded_and_quantised_weights_stay_as_they_are(model):
    model.model.layers[0].mlp.to("meta")
    layer = model.model.layers[1].mlp
    layer.up_proj.weight = nn.Parameter(layer.up_proj.weight.to(torch.int8), requires_grad=False)
    patch_model(model)
    reasons = {row.layer: row.reason for row in patch_report(model).rows if row.reason}
    assert reasons["model.layers.0.feedforward"] == "its weights are offloaded"
    assert reasons["model.layers.1.feedforward"] == "its weights are quantised or of dtype torch.int8"
    assert len(reasons) == 2


def test_a_patched_model_can_be_sliced():
    dense, ids = tiny_model(), tokens(2, 9)
    expected = logits(slice_model(dense, [tokens(4, 32)], sparsity=0.2, progress=False), ids)
    sliced = slice_model(patch_model(dense), [tokens(4, 32)], sparsity=0.2, progress=False)
    assert close(logits(sliced, ids), expected)
    assert close(logits(patch_model(sliced), ids), expected)


@pytest.mark.parametrize("everywhere", [False, True], ids=["layers", "all modules"])
def test_under_accelerates_hooks(model, everywhere):
    """Models spread over devices have a hook on every layer and every module in it, in the place of ``forward``."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module

    ids = tokens(2, 9)
    expected = logits(model, ids)
    layers = list(model.model.layers)
    hooked = [*layers, *(m for layer in layers for m in layer.modules() if everywhere and m._parameters)]
    hooked += [model.lm_head] if everywhere else []

    def hook():
        for module in hooked:
            add_hook_to_module(module, AlignDevicesHook(execution_device="cpu", io_same_device=True))

    hook()
    forwards = [module.__dict__["_old_forward"] for module in hooked]
    patch_model(model)
    assert patch_report(model).fused == 7
    assert layers[0]._old_forward.__self__.sublayers.keys() == {"attention", "feedforward"}
    assert close(logits(model, ids), expected)
    assert torch.equal(logits(unpatch_model(model), ids), expected)
    assert [module.__dict__["_old_forward"] for module in hooked] == forwards

    patch_model(model)
    for module in hooked:
        remove_hook_from_module(module)
    assert close(logits(model, ids), expected)
    assert torch.equal(logits(unpatch_model(model), ids), expected)
    assert patch_report(patch_model(model)).fused == 7
    hook()
    assert patch_report(model).fused == (1 if everywhere else 7)  # the head
    assert close(logits(model, ids), expected)
    assert torch.equal(logits(unpatch_model(model), ids), expected)


def test_offloading_hooks_keep_a_sublayer_unfused(model):
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    ids = tokens(2, 9)
    expected = logits(model, ids)
    projection = model.model.layers[0].self_attn.q_proj
    state = {name: tensor.clone() for name, tensor in projection.state_dict().items()}
    add_hook_to_module(projection, AlignDevicesHook(execution_device="cpu", offload=True, weights_map=state))
    assert patch_report(patch_model(model)).fused == 6
    assert close(logits(model, ids), expected)


def test_norms_that_are_done_share_one_vector_of_zeros():
    first, second = (normalised(torch.ones(rows, 3))[2] for rows in (5, 60))
    assert (first.shape, second.shape) == ((5,), (60,))
    assert not second.any()
    assert first.data_ptr() == second.data_ptr()
