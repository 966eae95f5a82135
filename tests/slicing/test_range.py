"""What rotation makes too large for a dtype is refused, what comes near in the stream is warned of."""

import warnings

import pytest
import torch
from models import tiny_model, tokens

from slicegpt_fast import InputError, slice_model


def sliced(model, **options):
    return slice_model(model, [tokens(4, 32)], progress=False, **{"sparsity": 0} | options)


@pytest.mark.parametrize("basis", ["per-norm", "shared"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_embeddings_that_overflow_when_rotated_are_refused(family, basis):
    model = tiny_model(family, dtype=torch.float16)
    table = model.get_input_embeddings().weight
    with torch.no_grad():
        table[:, :4] = 4.5e4 * torch.tensor([1, -1, 1, -1]) + 0 * table[:, :4]
    name = {"llama": r"model\.embed_tokens", "gpt2": r"transformer\.wte"}[family]
    with pytest.raises(InputError, match=rf"{name}\.weight overflows torch\.float16 .* dtype=torch\.bfloat16 or torch"):
        sliced(model, basis=basis, slice_head=True)
    assert sliced(model.bfloat16(), basis=basis, slice_head=True)(tokens(1, 5)).logits.isfinite().all()


@pytest.mark.parametrize("path", ["model.layers.1.mlp.down_proj", "model.layers.2.self_attn.o_proj", "lm_head"])
def test_weights_that_overflow_when_rotated_are_refused(path):
    model = tiny_model(dtype=torch.float16, attention_bias=False, mlp_bias=False)
    weight = model.get_submodule(path).weight
    with torch.no_grad():
        if path == "lm_head":  # reads through a large weight of the norm
            model.model.norm.weight.fill_(64.0)
            weight.fill_(2000.0)
        else:  # writes one long column, which its zero inputs keep from the stream
            weight[:, 0] = 6e4
            reader = path.replace("down_proj", "up_proj").replace("o_proj", "v_proj")
            model.get_submodule(reader).weight.zero_()
    with pytest.raises(InputError, match=rf"{path}\.weight overflows torch\.float16 when it is rotated"):
        sliced(model)
    assert all(parameter.isfinite().all() for parameter in sliced(model.float()).parameters())


def test_a_stream_near_the_maximum_is_warned_of():
    model = tiny_model(dtype=torch.float16)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 4e4
    with pytest.warns(UserWarning, match=r"enters model\..* reaches a norm of 4e\+04, and torch\.float16 holds 6\.55e"):
        sliced(model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_an_ordinary_stream_is_not(dtype):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sliced(tiny_model(dtype=dtype))
