"""The bases: principal components of the right signal, of the right tokens, of what the sliced model will see."""

import copy

import numpy as np
import pytest
import torch
from models import VOCABULARY, tiny_model, tokens
from transformers import BatchEncoding

from slicegpt_fast import InputError, perplexity, slice_model
from slicegpt_fast.ops import covariance_
from slicegpt_fast.slicing import SliceOptions, find_bases, fit_bases, make_plan
from slicegpt_fast.slicing.bases import principal_components


def stream_at_norms(model, ids):
    """The fp64 inputs of every norm of the dense model, in the stream's order: [sites, N, D]."""
    model = copy.deepcopy(model).double()
    seen = []
    body = model.model
    for norm in [norm for layer in body.layers for norm in (layer.input_layernorm, layer.post_attention_layernorm)] + [
        body.norm
    ]:
        norm.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
    model(ids)
    return torch.stack(seen)


def same_span(left: torch.Tensor, right: torch.Tensor) -> bool:
    return torch.allclose(left @ left.T, right @ right.T, atol=1e-4)


def test_principal_components_are_ordered_orthonormal_and_reproducible():
    factor = torch.randn(40, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    covariance = factor @ factor.T
    values, vectors = principal_components(covariance)
    assert (values.diff() <= 0).all()
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(40, dtype=torch.float64))
    torch.testing.assert_close(vectors * values @ vectors.T, covariance)
    assert (vectors.gather(0, vectors.abs().argmax(0, keepdim=True)) > 0).all()


@pytest.mark.parametrize("signal", ["raw", "normalized"])
@torch.no_grad()
def test_shared_basis_spans_the_summed_covariances(signal):
    model, ids = tiny_model(), tokens(4, 32)
    plan = make_plan(model, SliceOptions(sparsity=0.3, basis="shared", signal=signal))
    bases = find_bases(model, [ids[:1], ids[1:]], plan, progress=False)
    stream = stream_at_norms(model, ids)
    if signal == "normalized":
        stream = stream * torch.rsqrt(stream.square().mean(-1, keepdim=True) + model.config.rms_norm_eps)
    covariance = sum(rows.T @ rows for rows in stream)
    values, vectors = principal_components(covariance)
    assert bases.tokens == ids.numel()
    assert bases.spectra.shape == (1, 48)
    torch.testing.assert_close(bases.spectra[0], values, rtol=1e-4, atol=1e-4 * values[0].item())
    assert same_span(bases.matrices[0], vectors[:, :32])


@torch.no_grad()
def test_per_norm_bases_are_fitted_to_the_sliced_stream():
    """The first site sees the dense stream; a later one sees what the slices before it left."""
    model, ids = tiny_model().double(), tokens(4, 32)
    plan = make_plan(model, SliceOptions(sparsity=0.5))
    bases = find_bases(model, [ids], plan, progress=False)
    dense = stream_at_norms(model, ids)
    _, first = principal_components(dense[0].T @ dense[0])
    assert same_span(bases.matrices[0], first[:, :24])

    projected = copy.deepcopy(model)
    layer, first = projected.model.layers[0], bases.matrices[0]
    seen = []
    layer.register_forward_pre_hook(lambda _, args: (args[0] @ first @ first.T, *args[1:]))
    layer.post_attention_layernorm.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
    projected(ids)
    _, second = principal_components(seen[0].T @ seen[0])
    assert same_span(bases.matrices[1], second[:, :24])
    _, unsliced = principal_components(dense[1].T @ dense[1])
    assert not same_span(bases.matrices[1], unsliced[:, :24])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("basis", ["per-norm", "shared"])
@torch.no_grad()
def test_padding_counts_nowhere(basis, side):
    model = tiny_model("qwen2").double()
    long, short = tokens(1, 40), tokens(1, 25, seed=1)
    plan = make_plan(model, SliceOptions(sparsity=0.3, basis=basis, signal="normalized"))
    expected = find_bases(model, [long, short], plan, progress=False)
    filler = torch.zeros(1, 15, dtype=torch.long)
    parts = [filler, short] if side == "left" else [short, filler]
    masks = [torch.zeros_like(filler), torch.ones_like(short)]
    batch = {
        "input_ids": torch.cat([long, torch.cat(parts, 1)]),
        "attention_mask": torch.cat([torch.ones_like(long), torch.cat(masks if side == "left" else masks[::-1], 1)]),
    }
    padded = find_bases(model, [batch], plan, progress=False)
    assert padded.tokens == expected.tokens == 65
    for left, right in zip(padded.matrices, expected.matrices, strict=True):
        assert same_span(left, right)


@torch.no_grad()
def test_the_model_is_left_as_it_was():
    model = tiny_model().train()
    model.model.layers[1].mlp.eval()
    modes = [module.training for module in model.modules()]
    before = {name: (tensor, tensor.clone()) for name, tensor in model.state_dict().items()}
    find_bases(model, tokens(4, 32), make_plan(model, SliceOptions(sparsity=0.3)), progress=False)
    assert [module.training for module in model.modules()] == modes
    assert all("forward" not in vars(module) for module in model.modules())
    for name, tensor in model.state_dict().items():
        assert tensor.data_ptr() == before[name][0].data_ptr()
        assert torch.equal(tensor, before[name][1])


@torch.no_grad()
def test_a_forward_that_somebody_set_comes_back():
    model = tiny_model()
    layer = model.model.layers[1]
    layer.forward = own = layer.forward

    def fail(*_):
        raise RuntimeError("no positions")

    plan = make_plan(tiny_model(), SliceOptions(sparsity=0.3))
    find_bases(model, [tokens(4, 32)], plan, progress=False)
    assert vars(layer)["forward"] is own
    model.model.rotary_emb.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="no positions"):
        find_bases(model, [tokens(4, 32)], plan, progress=False)
    assert vars(layer)["forward"] is own
    assert "forward" not in vars(model.model.layers[0])


def test_only_padded_batches_are_masked(monkeypatch):
    """A mask that is true everywhere would cost a copy of the activations."""
    masks = []

    def spy(acc, x, row_scale, mask):
        masks.append(mask)
        return covariance_(acc, x, row_scale, mask)

    monkeypatch.setattr("slicegpt_fast.slicing.bases.covariance_", spy)
    whole, padded = torch.ones(1, 32, dtype=torch.long), torch.ones(1, 32, dtype=torch.long)
    padded[0, 30:] = 0
    batches = [tokens(1, 32), *({"input_ids": tokens(1, 32), "attention_mask": mask} for mask in (whole, padded))]
    fit_bases(tiny_model(), batches, SliceOptions(sparsity=0.3, refit=True), progress=False)
    assert masks[:2] == [None, None]
    assert torch.equal(masks[2], padded[0].bool())


def test_dropout_plays_no_part():
    model = tiny_model(attention_dropout=0.5)
    plan = make_plan(model, SliceOptions(sparsity=0.3))
    quiet = find_bases(model, [tokens(4, 32)], plan, progress=False)
    trained = find_bases(model.train(), [tokens(4, 32)], plan, progress=False)
    assert torch.equal(quiet.spectra, trained.spectra)


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        ([], r"calibration has 0 tokens"),
        ([tokens(1, 20)], r"calibration has 20 tokens, but a basis of 48 directions needs at least as many"),
        (
            [torch.full((1, 64), VOCABULARY)],
            rf"batch 0 holds token id {VOCABULARY}, but the model's vocabulary has {VOCABULARY}",
        ),
        ([tokens(1, 64), torch.full((1, 64), -1)], r"batch 1 holds token id -1"),
        ([torch.rand(2, 32)], r"input_ids must be integers of shape \[B, T\], not torch.float32"),
        ([torch.ones(2, 32, dtype=torch.bool)], r"input_ids must be integers of shape \[B, T\], not torch.bool"),
        ([tokens(2, 3, 4)], r"input_ids must be integers of shape \[B, T\], not torch.int64 \[2, 3, 4\]"),
        (["some text"], r"batch 0 must be a tensor of token ids or a mapping with input_ids, not str"),
        ([{"input_ids": tokens(2, 32), "attention_mask": torch.ones(2, 31)}], r"attention_mask has shape \[2, 31\]"),
        (
            [{"input_ids": tokens(2, 32), "attention_mask": torch.full((2, 32), -1e9)}],
            r"calibration: batch 0: attention_mask must hold 1 for tokens and 0 for padding, and nothing else",
        ),
        ([{"input_ids": tokens(2, 32), "attention_mask": "all"}], r"batch 0: attention_mask cannot be made a tensor"),
        ([{"ids": tokens(2, 32)}], r"batch 0 must be a tensor of token ids or a mapping with input_ids, not dict"),
        (
            [BatchEncoding({"input_ids": [[1, 2, 3], [4]]})],
            r"batch 0: input_ids cannot be made a tensor \(.*all rows",
        ),
        ([[["some", "text"]]], r"batch 0: input_ids cannot be made a tensor"),
        ([np.ones((2, 32))], r"batch 0: input_ids must be integers of shape \[B, T\], not torch.float64"),
        ([tokens(2, 32), tokens(0, 32)], r"batch 1 is empty \(input_ids have shape \[0, 32\]\): leave it out"),
        ([[]], r"batch 0: input_ids must be integers|batch 0 is empty"),
        (tokens(96), r"batch 0: input_ids must be integers of shape \[B, T\], not torch.int64 \[\]"),
        (None, r"^calibration must be a list of batches of token ids, not a single NoneType: make them with token_b"),
        ("some text", r"^calibration must be a list of batches of token ids, not a single str"),
        (BatchEncoding({"input_ids": [[1] * 64]}), r"^calibration must be a list .*, not a single BatchEncoding"),
    ],
)
def test_bad_calibration_is_named(calibration, message):
    model = tiny_model()
    with pytest.raises(InputError, match=message):
        find_bases(model, calibration, make_plan(model, SliceOptions(sparsity=0.3)), progress=False)
    with pytest.raises(InputError, match=message):
        slice_model(model, calibration, sparsity=0.3, progress=False)


@pytest.mark.parametrize("family", ["gpt2", "opt", "phi", "gpt-neox", "falcon-rw"])
def test_more_tokens_than_positions(family):
    """A table of positions has an end; rotary angles and slopes have none."""
    model = tiny_model(family, max_position_embeddings=128)
    plan = make_plan(model, SliceOptions(sparsity=0.3, slice_head=True))
    assert find_bases(model, [tokens(1, 128)], plan, progress=False).tokens == 128
    if family not in ("gpt2", "opt"):
        assert find_bases(model, [tokens(1, 129)], plan, progress=False).tokens == 129
        return
    message = "batch 1 has sequences of 129 tokens, but the model has 128 positions: cut them shorter"
    with pytest.raises(InputError, match=message):
        find_bases(model, [tokens(1, 9), tokens(1, 129)], plan, progress=False)
    with pytest.raises(InputError, match=message):
        perplexity(model, [tokens(1, 9), tokens(1, 129)])


@torch.no_grad()
def test_calibration_in_other_forms():
    model, ids = tiny_model(), tokens(4, 32)
    plan = make_plan(model, SliceOptions(sparsity=0.3))
    expected = find_bases(model, [ids], plan, progress=False).spectra
    padded = {"input_ids": ids.tolist(), "attention_mask": [[1] * 32] * 4}
    for each in (ids.int(), ids.numpy(), ids.numpy().astype(np.uint16), ids.tolist(), BatchEncoding(padded)):
        assert torch.equal(find_bases(model, [each], plan, progress=False).spectra, expected)


def test_activations_that_are_not_finite_name_the_layer():
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight[3, 5] = torch.inf
    with pytest.raises(
        InputError, match=r"entering model\.layers\.1\.post_attention_layernorm are not finite in torch\.float32"
    ):
        find_bases(model, [tokens(4, 32)], make_plan(model, SliceOptions(sparsity=0.3)), progress=False)
