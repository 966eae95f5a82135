"""What the table says of rows and columns is what the families' code does with them."""

import pytest
import torch
from models import CHANNELS, FAMILIES, LLAMA_FAMILIES, VALUES, tiny_model, tokens
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

from slicegpt_fast import InputError, slice_model
from slicegpt_fast.architectures import Decoder, Heads, Reader, architecture_of, table, weights
from slicegpt_fast.slicing import slice_config_of

NORMED_HEADS = ("minimax-m2", "olmoe")  # all of them by one norm, whose weights are in their order


def spread(logits):
    return (logits.max() - logits.min()).item()


def branches(decoder):
    """Each branch of the decoder layers with its layer, its readers' weights and its writers'."""
    for site, sublayer in decoder.sublayers():
        for branch in sublayer.branches:
            readers = [(each, weight) for each in branch.inputs for weight in weights(site.part, (each.path,))]
            yield branch, readers, weights(site.part, branch.writers)


def take_rows_(weight, rows, source):
    """Rows ``rows`` become ``source``, of the matrix and of the bias."""
    matrix = weight.matrix.clone()
    matrix[..., rows, :] = matrix[..., source, :]
    if weight.bias is not None:
        bias = weight.bias.clone()
        bias[rows] = bias[source]
        weight.bias = bias
    weight.matrix = matrix


def take_columns_(weight, columns, source):
    matrix = weight.matrix.clone()
    matrix[..., columns] = matrix[..., source]
    weight.matrix = matrix


def mix_rows_(weight, rows, mixing):
    """``mixing`` times the rows ``rows``, of the matrix and of the bias."""
    matrix = weight.matrix.clone()
    matrix[..., rows, :] = mixing @ matrix[..., rows, :]
    if weight.bias is not None:
        bias = weight.bias.clone()
        bias[rows] = mixing @ bias[rows]
        weight.bias = bias
    weight.matrix = matrix


def changed_without_effect(model, change_):
    """Assert that ``change_`` leaves the logits, and return the names of the weights that it changed."""
    ids = tokens(2, 33)
    expected = model(ids).logits
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    change_(Decoder(model))
    assert (model(ids).logits - expected).abs().max() <= 2e-5 * spread(expected)
    return [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]


@pytest.mark.parametrize("family", CHANNELS)
@torch.no_grad()
def test_channels_of_a_feed_forward_network(family):
    """Permuting them in readers and writers changes nothing; every reader and writer but the router takes part."""
    model = tiny_model(family)
    generator = torch.Generator().manual_seed(2)
    seen = []

    def permute_(decoder):
        for branch, readers, (writer,) in branches(decoder):
            if branch.activation is None:
                continue
            channels = writer.matrix.shape[-1]
            order = torch.randperm(channels, generator=generator)
            for reader, weight in readers:
                for output in reader.outputs:
                    if output != "router":
                        rows = torch.tensor(reader.channels(output, weight.matrix.shape[-2]))
                        assert len(rows) == channels
                        take_rows_(weight, rows, rows[order])
                        seen.append(output)
            take_columns_(writer, torch.arange(channels), order)

    changed = changed_without_effect(model, permute_)
    assert seen.count("up") == 3  # one network in each layer
    assert seen.count("gate") in (0, 3)
    assert sum(not name.endswith("bias") for name in changed) >= 6


@pytest.mark.parametrize("family", [*LLAMA_FAMILIES, "phi3", "mixtral", "qwen3-moe", "stablelm"])
@torch.no_grad()
def test_the_gate_is_what_the_activation_is_applied_to(family):
    """A network is linear in the other half: doubled and negated, it is made up for behind the activation."""
    model = tiny_model(family)

    def negate_(decoder):
        for _, readers, (writer,) in branches(decoder):
            for reader, weight in readers:
                if "up" in reader.outputs:
                    channels = writer.matrix.shape[-1]
                    rows = list(reader.channels("up", weight.matrix.shape[-2]))
                    mix_rows_(weight, rows, -2 * torch.eye(channels))
                    writer.matrix = -0.5 * writer.matrix

    assert len(changed_without_effect(model, negate_)) >= 6


@pytest.mark.parametrize("family", VALUES)
@torch.no_grad()
def test_values_of_an_attention(family):
    """Mixing the values of a head, and unmixing them in the output projection, changes nothing."""
    model = tiny_model(family)
    generator = torch.Generator().manual_seed(2)

    def mix_(decoder):
        heads = decoder.heads
        for branch, readers, writers in branches(decoder):
            if branch.activation is not None:
                continue
            (writer,) = writers
            assert writer.matrix.shape[-1] == heads.queries * heads.size
            ((reader, weight),) = [each for each in readers if "value" in each[0].outputs]
            rows = heads.rows(reader, "value")
            assert len(rows) == heads.values
            for head, its_rows in enumerate(rows):
                mixing, _ = torch.linalg.qr(torch.randn(heads.size, heads.size, generator=generator))
                mixing *= 1.5 + head
                mix_rows_(weight, list(its_rows), mixing)
                columns = heads.columns(head)
                matrix = writer.matrix.clone()
                blocks = matrix[:, columns.start : columns.stop].unflatten(1, (-1, heads.size))
                matrix[:, columns.start : columns.stop] = (blocks @ mixing.inverse()).flatten(1)
                writer.matrix = matrix

    assert len(changed_without_effect(model, mix_)) >= 6


@pytest.mark.parametrize("family", [family for family in VALUES if family not in NORMED_HEADS])
@torch.no_grad()
def test_heads_of_an_attention(family):
    """Reversing the order of the key and value heads, with the queries that attend to them, changes nothing."""
    # ALiBi gives every query head its own slope, so that their order counts.
    model = tiny_model(family, **{"alibi": False} if family == "falcon-rw" else {})

    def reverse_(decoder):
        heads = decoder.heads
        for branch, readers, writers in branches(decoder):
            if branch.activation is not None:
                continue
            (writer,) = writers
            assert sorted(output for reader, _ in readers for output in reader.outputs) == ["key", "query", "value"]
            for reader, weight in readers:
                taken = []
                for output in reader.outputs:
                    rows = torch.tensor([list(each) for each in heads.rows(reader, output)])
                    taken += rows.flatten().tolist()
                    by_value = rows.view(heads.values, -1)
                    take_rows_(weight, by_value.flatten(), by_value.flip(0).flatten())
                assert sorted(taken) == list(range(weight.matrix.shape[-2]))  # each row is of one head
            columns = torch.tensor([list(heads.columns(head)) for head in range(heads.values)])
            take_columns_(writer, columns.flatten(), columns.flip(0).flatten())

    changed = changed_without_effect(model, reverse_)
    assert len(changed) >= 6 or Decoder(model).heads.values == 1


def test_rows_by_hand():
    heads = Heads(queries=4, values=2, size=3)
    fused = ("query", "key", "value")
    assert heads.rows(Reader("qkv", fused), "value") == [range(18, 21), range(21, 24)]
    grouped = Reader("qkv", fused, grouped=True)
    assert heads.rows(grouped, "query") == [range(3), range(3, 6), range(12, 15), range(15, 18)]
    assert heads.rows(grouped, "value") == [range(9, 12), range(21, 24)]
    assert heads.columns(1) == range(6, 12)
    assert Reader("gate_up", ("gate", "up")).channels("up", 10) == range(5, 10)


@pytest.mark.parametrize("family", FAMILIES)
def test_sites_are_numbered_along_the_stream(family):
    model = tiny_model(family)
    decoder = Decoder(model)
    assert [site.number for site in decoder.sites] == list(range(len(decoder.sites)))
    assert [site for site, _ in decoder.sublayers()] == decoder.sites[:-1]
    assert [site.index for site in decoder.sites] == sorted(site.index for site in decoder.sites)
    assert decoder.sites[-1].sublayer is None
    assert decoder.sites[-1].index == model.config.num_hidden_layers == 3
    for site in decoder.sites:
        assert model.get_submodule(site.path) is site.part
        assert model.get_submodule(site.norm_path) is site.norm
    assert decoder.sites[-1].norm is decoder.final_norm
    assert model.get_submodule(decoder.head_path) is decoder.head is model.get_output_embeddings()
    assert model.get_submodule(decoder.layer_path(2)) is decoder.layers[2]
    assert model.get_input_embeddings() in decoder.embeddings.values()
    assert decoder.width == 48


@pytest.mark.parametrize("model_type", sorted({CONFIG_MAPPING[name].model_type for name in CAUSAL}))
def test_every_causal_language_model_has_a_row_or_a_reason(model_type):
    """Fails on what a new release of transformers brings."""
    assert (model_type in table.ARCHITECTURES) != (model_type in table.REFUSED)
    assert model_type in table.REFUSED or model_type in {each for each, _ in FAMILIES.values()}


def test_a_refused_family_is_refused_with_its_reason():
    with pytest.raises(InputError, match="'mamba' cannot be sliced: some or all of its layers are recurrent"):
        architecture_of(CONFIG_MAPPING["mamba"]())
    with pytest.raises(InputError, match="'whisper' cannot be sliced: it is one half of a model with an encoder"):
        architecture_of(CONFIG_MAPPING["whisper"]())
    with pytest.raises(InputError, match="this HyperCLOVA X cannot be sliced: a weighted norm stands between"):
        architecture_of(CONFIG_MAPPING["hyperclovax"](use_post_norm=True))


@pytest.mark.parametrize(
    ("family", "axis", "reason"),
    [
        ("bitnet", "channels", "a norm over all of them"),
        ("bitnet", "values", "a norm stands between"),
        ("youtu", "values", "its heads make their values of one latent vector"),
        ("qwen2-moe", "channels", "the experts that all tokens share have other channels"),
    ],
)
def test_an_axis_that_a_family_refuses(family, axis, reason):
    with pytest.raises(InputError, match=rf"models cannot be cut along '{axis}': {reason}.* Leave it out of cut\."):
        slice_model(tiny_model(family), [tokens(4, 32)], target_params=0.9, cut=("stream", axis), progress=False)
    cut = slice_model(tiny_model(family), [tokens(4, 32)], target_params=0.9, round_to=8, progress=False)
    plan = slice_config_of(cut).plan()
    assert not plan.sizes(axis)


def test_a_row_names_the_transformers_that_it_needs(monkeypatch):
    monkeypatch.setattr(table.transformers, "__version__", "5.4.0")
    architecture_of(CONFIG_MAPPING["llama"]())
    with pytest.raises(InputError, match=r"'gpt2' needs transformers 5\.17 or newer, this is 5\.4\.0: upgrade it"):
        architecture_of(CONFIG_MAPPING["gpt2"]())
