"""Checkpoints of the published code, written here as it documents them, computed by hand and imported."""

import dataclasses
import json
import pathlib
import shutil

import pytest
import torch
from models import tiny_model, tokens
from torch.nn.functional import embedding, gelu, linear, relu, scaled_dot_product_attention, silu

from slicegpt_fast import InputError, import_reference, load_model, save_model
from slicegpt_fast.slicing import SliceOptions, apply_bases, find_bases, make_plan

LAYERS, FULL = 3, 48
WIDTHS = {  # of every norm site; Phi's attention and MLP share one
    "llama": (32, 40, 24, 36, 44, 28, 48),
    "phi3": (32, 40, 24, 36, 44, 28, 20),
    "opt": (32, 40, 24, 36, 44, 28, 48),
    "phi": (32, 40, 24, 48),
}
OPTIONS = {
    "llama": dict(rms_norm_eps=1e-5, attention_bias=False, mlp_bias=False),
    "phi3": dict(rms_norm_eps=1e-5),
    "opt": {},
    "phi": dict(layer_norm_eps=1e-5, qk_layernorm=False),
}
SHORTCUTS = {"attention": "attn_shortcut_Q", "feedforward": "mlp_shortcut_Q", "block": "attn_shortcut_Q"}


def write(model, folder, *, widths):
    """Save a model sliced here with ``widths`` as the published code would have; returns the two paths."""
    state = {}
    for name, tensor in model.state_dict().items():
        layer, _, last = name.removesuffix(".weight").rpartition(".")
        if last.endswith("_shortcut"):
            state[f"{layer}.{SHORTCUTS[last.removesuffix('_shortcut')]}"] = tensor.T.clone()  # [d, d']: h Q
        else:
            state[name] = tensor
    parallel = model.config.model_type == "phi"
    read = [dict(enumerate(widths[first : 2 * LAYERS : 2])) for first in (0, 1)]
    written = [dict(enumerate(widths[first::2])) for first in (1, 2)]
    if parallel:
        read, written = [dict(enumerate(widths[:-1])), {}], [{}, dict(enumerate(widths[1:]))]
    sizes = dict(
        hidden_size=FULL,
        layers_num=LAYERS,
        do_slice_head=widths[-1] < FULL,
        parallel_blocks=parallel,
        embedding_dimensions=dict.fromkeys(range(2 if model.config.model_type == "opt" else 1), widths[0]),
        attention_input_dimensions=read[0],
        attention_output_dimensions=written[0],
        mlp_input_dimensions=read[1],
        mlp_output_dimensions=written[1],
        head_dimension=widths[-1],
        const_dimension=None,
    )
    pt, sizes_file = folder / "model_0.25.pt", folder / "model_0.25.json"
    torch.save(state, pt)
    sizes_file.write_text(json.dumps(sizes))
    return pt, sizes_file


@torch.no_grad()
def make_checkpoint(family, folder, widths=None):
    """A sliced model of ``family`` and its two files."""
    widths = widths or WIDTHS[family]
    dense = tiny_model(family, **OPTIONS[family])
    plan = dataclasses.replace(make_plan(dense, SliceOptions(sparsity=0, slice_head=True)), widths=widths)
    model = apply_bases(dense, find_bases(dense, [tokens(4, 32, seed=1)], plan, progress=False), progress=False)
    return model, *write(model, folder, widths=widths)


def base_config(family):
    """The dense model's config, with an epsilon that the published code would have ignored."""
    return tiny_model(family, **OPTIONS[family] | {key: 3e-4 for key in OPTIONS[family] if key.endswith("eps")}).config


def rotate(x, rotary):
    """Rotary embedding of the first ``rotary`` entries of every head: x [heads, T, head_dim]."""
    frequencies = 10000.0 ** (-torch.arange(0, rotary, 2, dtype=torch.float64) / rotary)
    angles = torch.outer(torch.arange(x.shape[1], dtype=torch.float64), frequencies).repeat(1, 2)
    turned, rest = x[..., :rotary], x[..., rotary:]
    first, second = turned.chunk(2, -1)
    return torch.cat([turned * angles.cos() + torch.cat([-second, first], -1) * angles.sin(), rest], -1)


def exact_logits(pt, family, ids):
    """What the published code computes from a checkpoint, in fp64: ids [T] -> [T, vocabulary]."""
    state = {name: tensor.double() for name, tensor in torch.load(pt).items()}
    body = "model.decoder" if family == "opt" else "model"

    def apply(name, x):
        return linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))

    def norm(h):
        return h / (h.square().sum(-1, keepdim=True) / FULL + 1e-5).sqrt()

    def attend(prefix, x, output, rotary):
        if family == "phi3":
            q, k, v = apply(f"{prefix}.qkv_proj", x).split([48, 24, 24], -1)
        else:
            q, k, v = (apply(f"{prefix}.{name}_proj", x) for name in "qkv")
        q, k, v = (y.unflatten(-1, (-1, 12)).transpose(0, 1) for y in (q, k, v))
        if rotary:
            q, k = rotate(q, rotary), rotate(k, rotary)
        y = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return apply(f"{prefix}.{output}", y.transpose(0, 1).flatten(1))

    h = embedding(ids, state[f"{body}.embed_tokens.weight"])
    if family == "opt":
        h = h + state[f"{body}.embed_positions.weight"][2 : 2 + len(ids)]
    for index in range(LAYERS):
        layer = f"{body}.layers.{index}"
        attention, mlp = f"{layer}.self_attn", f"{layer}.mlp"
        through_attention = h @ state[f"{layer}.attn_shortcut_Q"]
        if family == "phi":
            up = gelu(apply(f"{mlp}.fc1", norm(h)), approximate="tanh")
            h = through_attention + attend(attention, norm(h), "dense", 6) + apply(f"{mlp}.fc2", up)
            continue
        output, rotary = ("out_proj", 0) if family == "opt" else ("o_proj", 12)
        h = through_attention + attend(attention, norm(h), output, rotary)
        x, residual = norm(h), h @ state[f"{layer}.mlp_shortcut_Q"]
        if family == "opt":
            h = residual + apply(f"{layer}.fc2", relu(apply(f"{layer}.fc1", x)))
        elif family == "phi3":
            gate, up = apply(f"{mlp}.gate_up_proj", x).chunk(2, -1)
            h = residual + apply(f"{mlp}.down_proj", silu(gate) * up)
        else:
            gated = silu(apply(f"{mlp}.gate_proj", x)) * apply(f"{mlp}.up_proj", x)
            h = residual + apply(f"{mlp}.down_proj", gated)
    return apply("lm_head", norm(h))


@pytest.mark.parametrize("family", WIDTHS)
@torch.no_grad()
def test_imported_model_computes_the_checkpoint(family, tmp_path):
    sliced, pt, sizes = make_checkpoint(family, tmp_path)
    config = base_config(family)
    before = config.to_dict()
    model = import_reference(pt, sizes, config)
    assert config.to_dict() == before
    assert type(model) is type(sliced)
    assert not model.training
    assert model.config.quantization_config.widths == list(WIDTHS[family])
    assert model.config.quantization_config.basis == "per-norm"

    ids = tokens(1, 21)
    logits = model(ids).logits
    exact = exact_logits(pt, family, ids[0])
    spread = exact.max() - exact.min()
    assert (logits[0] - exact).abs().max() <= 1e-5 * spread
    assert (logits - sliced(ids).logits).abs().max() <= 1e-6 * spread  # both maps are the same one

    save_model(model, tmp_path / "saved")
    assert torch.equal(load_model(tmp_path / "saved")(ids).logits, logits)
    assert model.generate(ids, max_new_tokens=4, do_sample=False).shape == (1, 25)


@torch.no_grad()
def test_half_precision_and_tensors_of_older_releases(tmp_path):
    _, pt, sizes = make_checkpoint("llama", tmp_path)
    state = {name: tensor.half() for name, tensor in torch.load(pt).items()}
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(6)
    torch.save(state, pt)
    model = import_reference(str(pt), str(sizes), base_config("llama"))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}
    exact = exact_logits(pt, "llama", tokens(1, 21)[0])
    error = (model(tokens(1, 21)).logits[0] - exact).abs().mean()
    assert error <= 0.01 * (exact.max() - exact.min())


@pytest.mark.parametrize("slice_head", [False, True])
def test_one_size_for_all_places(slice_head, tmp_path):
    """What the published code makes of a checkpoint that was saved without sizes."""
    widths = (32,) * 6 + (32 if slice_head else FULL,)
    _, pt, sizes = make_checkpoint("llama", tmp_path, widths)
    empty = dict(hidden_size=0, layers_num=0, parallel_blocks=False, head_dimension=None, embedding_dimensions={})
    sizes.write_text(json.dumps(empty | dict(do_slice_head=slice_head, const_dimension=32)))
    model = import_reference(pt, sizes, base_config("llama"))
    assert model.config.quantization_config.widths == list(widths)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_checkpoint("llama", tmp_path_factory.mktemp("reference"))[1:]


@pytest.fixture
def checkpoint(files, tmp_path):
    """A copy of a checkpoint's two files, to be damaged."""
    return tuple(pathlib.Path(shutil.copy(file, tmp_path)) for file in files)


class TestRefusals:
    def refused(self, pt, sizes, match, config=None):
        with pytest.raises(InputError, match=match) as caught:
            import_reference(pt, sizes, config or base_config("llama"))
        assert str(caught.value).count(". ") == 0  # one sentence

    @pytest.mark.parametrize("missing", [0, 1])
    def test_missing_file(self, checkpoint, missing):
        checkpoint[missing].unlink()
        self.refused(*checkpoint, f"cannot read .*{checkpoint[missing].name}: No such file")

    @pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04", "half"])
    def test_damaged_weights(self, checkpoint, content):
        data = checkpoint[0].read_bytes()
        checkpoint[0].write_bytes(data[: len(data) // 2] if content == "half" else content)
        self.refused(*checkpoint, "model_0.25.pt is damaged or holds more than tensors")

    @pytest.mark.parametrize("content", [{"a": pathlib.Path("x")}, torch.nn.Linear(2, 2)])
    def test_pickled_objects_are_not_loaded(self, checkpoint, content):
        torch.save(content, checkpoint[0])
        self.refused(*checkpoint, "damaged or holds more than tensors")

    @pytest.mark.parametrize(
        "content", [torch.ones(2), [torch.ones(2)], {0: torch.ones(2)}, {"model": {"a": torch.ones(2)}, "step": 3}]
    )
    def test_not_a_state_dict(self, checkpoint, content):
        torch.save(content, checkpoint[0])
        self.refused(*checkpoint, "does not hold a state dict of tensors")

    @pytest.mark.parametrize("name", ["model.layers.1.mlp_shortcut_Q", "lm_head.weight"])
    def test_missing_tensor(self, checkpoint, name):
        state = torch.load(checkpoint[0])
        del state[name]
        torch.save(state, checkpoint[0])
        self.refused(*checkpoint, r"lacks (lm_head|model.layers.1.feedforward_shortcut).*, unlike a sliced LlamaForC")

    def test_adapters(self, checkpoint):
        torch.save(torch.load(checkpoint[0]) | {"model.layers.0.lora_A": torch.ones(2)}, checkpoint[0])
        self.refused(*checkpoint, r"has model.layers.0.lora_A, unlike a sliced LlamaForCausalLM: .* merge adapters")

    def test_sizes_of_another_checkpoint(self, checkpoint, tmp_path):
        (tmp_path / "other").mkdir()
        _, _, sizes = make_checkpoint("llama", tmp_path / "other", (40,) * 6 + (FULL,))
        self.refused(checkpoint[0], sizes, r"has shape \[\d+, \d+\], but the sizes ask for .* do not belong together")

    @pytest.mark.parametrize("content", ["", "{", "[]", "3", "{}", '{"const_dimension": null}', b"\xff\xfe"])
    def test_not_a_file_of_sizes(self, checkpoint, content):
        checkpoint[1].write_bytes(content if isinstance(content, bytes) else content.encode())
        self.refused(*checkpoint, "model_0.25.json is not a file of slicing dimensions")

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("embedding_dimensions", {"0": 40}),
            ("mlp_output_dimensions", {"0": 24, "1": 40, "2": 48}),
            ("head_dimension", 56),
            ("attention_input_dimensions", {"0": 32.5, "1": 24, "2": 44}),
        ],
    )
    def test_contradicting_sizes(self, checkpoint, key, value):
        checkpoint[1].write_text(json.dumps(json.loads(checkpoint[1].read_text()) | {key: value}))
        self.refused(*checkpoint, "contradict one another")

    def test_config_of_another_model(self, checkpoint):
        deeper = tiny_model("llama", num_hidden_layers=4).config
        self.refused(*checkpoint, r"= \(48, 3, False\), but base_config has \(48, 4, False\)", deeper)
        self.refused(*checkpoint, r"but base_config has \(48, 3, True\)", base_config("phi"))
        self.refused(*checkpoint, r"lacks lm_head.bias, unlike a sliced OPTForCausalLM", base_config("opt"))
        biased = tiny_model("llama").config
        self.refused(*checkpoint, r"lacks model.layers.0.mlp.down_proj.bias, unlike", biased)

    @pytest.mark.parametrize("family", ["gpt2", "mistral"])
    def test_family_that_the_published_code_lacks(self, checkpoint, family):
        config = tiny_model(family).config
        self.refused(*checkpoint, f"'{family}': the published code slices llama, opt, phi, phi3", config)

    def test_not_a_config(self, checkpoint):
        self.refused(*checkpoint, "must be a transformers causal language model", {"model_type": "llama"})
