"""Rotation alone changes nothing, and slicing is exactly a projection of the stream at every norm site."""

import copy

import pytest
import torch
from models import FAMILIES, LLAMA_FAMILIES, in_double, tiny_model, tokens

from slicegpt_fast import slice_model
from slicegpt_fast.architectures import Decoder
from slicegpt_fast.slicing import SliceOptions, apply_bases, find_bases, make_plan


def spread(logits: torch.Tensor) -> float:
    return (logits.max() - logits.min()).item()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("basis", ["per-norm", "shared"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_no_sparsity_leaves_the_logits(family, basis, tied):
    model = tiny_model(family, tied=tied)
    ids = tokens(2, 33)
    expected = model(ids).logits
    rounding = (in_double(model)(ids).logits - expected).abs().max()
    for signal in ("raw", "normalized"):
        sliced = slice_model(model, [tokens(4, 32, seed=1)], sparsity=0, basis=basis, signal=signal, progress=False)
        assert (sliced(ids).logits - expected).abs().max() <= 2e-5 * spread(expected) + 2 * rounding
    assert torch.equal(model(ids).logits, expected)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_shared_slice_is_a_projection_before_every_norm(family):
    """Nothing but the norms reads the stream, so projecting their inputs is the whole of a slice by one basis."""
    model = tiny_model(family)
    plan = make_plan(model, SliceOptions(sparsity=0.3, basis="shared"))
    bases = find_bases(model, [tokens(4, 32, seed=1)], plan, progress=False)
    ids = tokens(2, 19)
    sliced = apply_bases(model, bases, progress=False)(ids).logits
    dense = model(ids).logits
    projected = in_double(model)
    projection = bases.matrices[0] @ bases.matrices[0].T
    norms = {branch.norm for sublayer in Decoder(model).architecture.sublayers for branch in sublayer.branches}
    final = Decoder(model).architecture.final_norm

    def project(_, inputs):
        stream = inputs[0]
        if Decoder(model).architecture.centered:
            stream = stream - stream.mean(-1, keepdim=True)
        return (stream @ projection,)

    for name, module in projected.named_modules():
        if name == final or any(name.endswith(f".{norm}") for norm in norms):
            module.register_forward_pre_hook(project)
    expected = projected(ids).logits
    assert (expected - dense).abs().max() > 0.01 * spread(dense)
    rounding = (in_double(model)(ids).logits - dense).abs().max()
    assert (sliced - expected).abs().max() <= 2e-5 * spread(expected) + 2 * rounding


@torch.no_grad()
def projected_logits(model, bases, ids):
    """Logits of the dense model in fp64 whose stream is projected onto the span of each site's basis."""
    model = copy.deepcopy(model).double()
    basis = [bases.matrices[group] for group in bases.plan.groups]
    projections = iter([matrix @ matrix.T for matrix in basis])
    body = model.model
    stream = body.embed_tokens(ids)
    positions = body.rotary_emb(stream, torch.arange(ids.shape[1])[None])
    for layer in body.layers:
        stream = stream @ next(projections)
        stream = (
            stream
            + layer.self_attn(layer.input_layernorm(stream), position_embeddings=positions, attention_mask=None)[0]
        )
        stream = stream @ next(projections)
        stream = stream + layer.mlp(layer.post_attention_layernorm(stream))
    return model.lm_head(body.norm(stream @ next(projections)))


@pytest.mark.parametrize("basis", ["per-norm", "shared"])
@pytest.mark.parametrize("family", LLAMA_FAMILIES)
@torch.no_grad()
def test_slicing_is_projection(family, basis):
    model = tiny_model(family, **{"sliding_window": None} if family == "mistral" else {})
    plan = make_plan(model, SliceOptions(sparsity=0.3, basis=basis, slice_head=basis == "per-norm"))
    assert set(plan.widths) == {32}
    bases = find_bases(model, [tokens(4, 32, seed=1)], plan, progress=False)
    ids = tokens(2, 19)
    expected = projected_logits(model, bases, ids)
    dense = model(ids).logits
    assert (expected - dense).abs().max() > 0.01 * spread(dense)  # the slice does something
    exact = apply_bases(copy.deepcopy(model).double(), bases, progress=False)(ids).logits
    assert (exact - expected).abs().max() <= 1e-6 * spread(expected)  # norms and rotary tables are fp32 in any model
    sliced = apply_bases(model, bases, progress=False)(ids).logits
    rounding = (in_double(model)(ids).logits - dense).abs().max()
    assert (sliced - expected).abs().max() <= 2e-5 * spread(expected) + 2 * rounding


ROPE = {
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "longrope": {
        "short_factor": [1.0] * 6,
        "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 6.0],
        "original_max_position_embeddings": 16,
        "factor": 8.0,
    },
}


@pytest.mark.parametrize("length", [12, 40])
@pytest.mark.parametrize("rope_type", ROPE)
@torch.no_grad()
def test_rotary_variants_stay_right(rope_type, length):
    """Positions reach the attention unchanged, below and beyond the length that the model was first trained on."""
    rope = {"rope_type": rope_type, "rope_theta": 10000.0} | ROPE[rope_type]
    model = tiny_model("phi3" if rope_type == "longrope" else "llama", rope_parameters=rope, max_position_embeddings=32)
    ids = tokens(2, length)
    expected = model(ids).logits
    plain = tiny_model("phi3" if rope_type == "longrope" else "llama", max_position_embeddings=32)(ids).logits
    if rope_type != "dynamic" or length > 32:
        assert (plain - expected).abs().max() > 0.01 * spread(expected)
    sliced = slice_model(model, [tokens(4, length, seed=1)], sparsity=0, progress=False)
    assert (sliced(ids).logits - expected).abs().max() <= 1e-5 * spread(expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_16_bit_models_are_sliced_in_their_own_dtype(dtype):
    model = tiny_model("qwen2", dtype=dtype)
    ids = tokens(2, 33)
    exact = copy.deepcopy(model).double()(ids).logits
    sliced = slice_model(model, [tokens(4, 32, seed=1)], sparsity=0, progress=False)
    assert {parameter.dtype for parameter in sliced.parameters()} == {dtype}
    dense_error = (model(ids).logits - exact).abs().mean()
    # Rotated weights are rounded once more, and the shortcuts round the stream at every site.
    assert (sliced(ids).logits - exact).abs().mean() <= 4 * dense_error
