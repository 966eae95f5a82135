"""The shape of a decoder layer with fewer channels in its MLP, or values of a lower rank in its attention."""

from typing import Any, cast

import torch
from torch import nn

from slicegpt_fast.architectures import Branch, Decoder, Heads, Reader, Weight, at, weights
from slicegpt_fast.slicing.heads import CutHeads, PadValues, lower_values

# What nn.Linear, Conv1D and stacked experts call their sizes.
INPUTS = ("in_features", "nx")
OUTPUTS = ("out_features", "nf")
CHANNELS = ("intermediate_dim", "intermediate_size")


def channel_readers(layer: nn.Module, branch: Branch) -> list[tuple[Reader, Weight]]:
    """Return the readers whose rows are channels, those that ``layer`` has."""
    readers = [reader for reader in branch.inputs if "up" in reader.outputs or "gate" in reader.outputs]
    return [(reader, weight) for reader in readers for weight in weights(layer, (reader.path,))]


def value_reader(layer: nn.Module, branch: Branch) -> tuple[Reader, Weight]:
    """Return the reader with the rows of the values."""
    (reader,) = (reader for reader in branch.inputs if "value" in reader.outputs)
    (weight,) = weights(layer, (reader.path,))
    return reader, weight


def channels_of(decoder: Decoder) -> list[int]:
    """Return how many channels the feed-forward network of each layer has, every expert of it."""
    return [
        weights(site.part, branch.writers)[0].matrix.shape[-1]
        for site, sublayer in decoder.sublayers()
        for branch in sublayer.branches
        if branch.activation is not None
    ]


def narrow_channels_(layer: nn.Module, branch: Branch, size: int) -> None:
    """Give a feed-forward network ``size`` channels; its new weights are on the meta device."""
    for reader, weight in channel_readers(layer, branch):
        *experts, _, width = weight.matrix.shape
        rows = size * len(reader.outputs)
        _resize_(weight, (*experts, rows, width), OUTPUTS, rows)
        if weight.bias is not None:
            weight.bias = torch.empty(rows, device="meta")
    for writer in weights(layer, branch.writers):
        _resize_(writer, (*writer.matrix.shape[:-1], size), INPUTS, size)
        for name in CHANNELS:
            if hasattr(writer.owner, name):
                setattr(writer.owner, name, size)


def narrow_values_(layer: nn.Module, branch: Branch, heads: Heads, rank: int) -> None:
    """Give an attention values of ``rank`` and hooks that let its code run on; its new weights are on the meta device.

    A value bias goes through the output projection into its bias, which may be new.
    """
    reader, weight = value_reader(layer, branch)
    (writer,) = weights(layer, branch.writers)
    before = {"query": heads.queries * heads.size, "key": heads.values * heads.size, "value": heads.values * rank}
    rows = sum(before[cast(Any, output)] for output in reader.outputs)
    _resize_(weight, (rows, weight.matrix.shape[-1]), OUTPUTS, rows)
    _resize_(writer, (writer.matrix.shape[0], heads.queries * rank), INPUTS, heads.queries * rank)
    if weight.bias is not None:
        if writer.bias is None:
            writer.bias = torch.empty(writer.matrix.shape[0], device="meta")
        if reader.outputs == ("value",):
            weight.owner.register_parameter("bias", None)
        else:
            weight.bias = torch.empty(rows, device="meta")
    front = 0 if reader.grouped else rows - heads.values * rank
    module = branch.modules[0]
    lower_values(
        at(layer, module),
        reader.path.removeprefix(f"{module}."),
        branch.writers[0].removeprefix(f"{module}."),
        PadValues(front, heads.values, heads.size - rank),
        CutHeads(heads.queries, rank),
    )


def narrow_layers_(decoder: Decoder, channels: tuple[int, ...], values: tuple[int, ...]) -> None:
    """Give every decoder layer its number of channels and its rank of the values; empty tuples leave them alone."""
    present = channels_of(decoder)
    for site, sublayer in decoder.sublayers():
        for branch in sublayer.branches:
            if branch.activation is not None and channels and channels[site.index] != present[site.index]:
                narrow_channels_(site.part, branch, channels[site.index])
            if branch.activation is None and values and values[site.index] != decoder.heads.size:
                narrow_values_(site.part, branch, decoder.heads, values[site.index])


def _resize_(weight: Weight, shape: tuple[int, ...], attributes: tuple[str, ...], size: int) -> None:
    weight.matrix = torch.empty(*shape, device="meta")
    for attribute in attributes:
        if hasattr(weight.owner, attribute):
            setattr(weight.owner, attribute, size)
