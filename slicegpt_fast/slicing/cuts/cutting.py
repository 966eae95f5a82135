"""From statistics to a model with fewer channels and values: fit every layer's cuts, then fill the narrow copy.

A cut leaves the residual stream as it is: norms, embeddings and the head stay the dense model's, and so does their tie.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from slicegpt_fast.architectures import Branch, Decoder, Heads, Weight, weights
from slicegpt_fast.slicing.cuts.channels import eliminate, repair, survivors
from slicegpt_fast.slicing.cuts.curve import Curve, total
from slicegpt_fast.slicing.cuts.narrow import channel_readers, narrow_layers_, value_reader
from slicegpt_fast.slicing.cuts.sensitivity import Sensitivity, WriterStatistics
from slicegpt_fast.slicing.cuts.values import fold_bias, principal_values, project, refit
from slicegpt_fast.slicing.layers import copy_rest_, empty_copy

Statistics = tuple[WriterStatistics, ...]  # one for a linear writer, one per expert for stacked ones


@dataclass(frozen=True)
class ChannelCut:
    """What a layer's channels are worth.

    Attributes:
        curve: predicted loss per token against channels kept, by every expert of the layer alike.
        orders: [F] per expert, the channels as they are removed.
        inputs: C [F, F] of the writer, per expert, in host memory: those of all layers are kept until the cut is made.
    """

    curve: Curve
    orders: tuple[Tensor, ...]
    inputs: tuple[Tensor, ...]

    @torch.no_grad()
    def fill_(self, narrow: nn.Module, dense: nn.Module, branch: Branch, size: int) -> None:
        """Fill the narrow layer's weights of ``branch`` with those of the ``size`` channels that stay."""
        (source,), (target,) = weights(dense, branch.writers), weights(narrow, branch.writers)
        kept = [survivors(order, size) for order in self.orders]
        each = zip(_stack(source), self.inputs, kept, strict=True)
        writers = [repair(matrix.T, inputs.to(matrix.device), k).T for matrix, inputs, k in each]
        target.matrix = _unstack(writers, source)
        readers = zip(channel_readers(dense, branch), channel_readers(narrow, branch), strict=True)
        for (reader, weight), (_, to) in readers:
            starts = [reader.channels(output, weight.matrix.shape[-2]).start for output in reader.outputs]
            rows = [torch.cat([start + k for start in starts]) for k in kept]
            to.matrix = _unstack([matrix[r] for matrix, r in zip(_stack(weight), rows, strict=True)], weight)
            if weight.bias is not None:
                to.bias = weight.bias[rows[0]]
        if source.bias is not None:
            target.bias = source.bias.clone()


@dataclass(frozen=True)
class ValueCut:
    """What the dimensions of a layer's values are worth.

    Attributes:
        curve: predicted loss per token against the rank.
        bases: [G, head dim, head dim] fp64, of each key and value head, the most valuable first.
        inputs: C of the output projection, without the value bias, in host memory.
        gain: [D] fp64, what the value bias adds to the output projection's; None where there is no value bias.
    """

    curve: Curve
    bases: Tensor
    inputs: Tensor
    gain: Tensor | None

    @torch.no_grad()
    def fill_(self, narrow: nn.Module, dense: nn.Module, branch: Branch, heads: Heads, rank: int) -> None:
        """Fill the narrow layer's weights of ``branch`` with values of ``rank``."""
        (reader, source), (_, target) = value_reader(dense, branch), value_reader(narrow, branch)
        ranges = heads.rows(reader, "value")
        rows = project(torch.cat([source.matrix[r.start : r.stop] for r in ranges]), self.bases, rank).split(rank)
        target.matrix = _replaced(source.matrix, ranges, rows)
        if target.bias is not None and source.bias is not None:
            target.bias = _replaced(source.bias, ranges, [source.bias.new_zeros(rank)] * len(ranges))
        (output,), (narrow_output,) = weights(dense, branch.writers), weights(narrow, branch.writers)
        inputs = self.inputs.to(output.matrix.device)
        narrow_output.matrix = refit(output.matrix.T, inputs, self.bases, rank).T
        if narrow_output.bias is not None:
            narrow_output.bias = sum((b.double() for b in (output.bias, self.gain) if b is not None), torch.zeros(()))


@dataclass(frozen=True)
class LayerCuts:
    """The cuts of one decoder layer; None where it is not to be cut."""

    channels: ChannelCut | None
    values: ValueCut | None


def fit_cuts(
    decoder: Decoder,
    sensitivity: Sensitivity,
    *,
    channels: int | None,
    values: int | None,
    layers: range | None = None,
    progress: bool = True,
) -> list[LayerCuts]:
    """Fit the cuts of decoder layers.

    Args:
        decoder: the dense model.
        sensitivity: its statistics.
        channels, values: the step between sizes of each axis; None where it is not to be cut.
        layers: which of them, by default all.
        progress: show a progress bar over the layers.
    """
    sublayers = [*decoder.sublayers()]
    found: list[LayerCuts] = []
    layers = range(len(decoder.layers)) if layers is None else layers
    for index in tqdm(layers, desc="fitting cuts", unit="layer", disable=not progress):
        layer, cuts = decoder.layers[index], LayerCuts(None, None)
        for branch in (b for site, sublayer in sublayers if site.index == index for b in sublayer.branches):
            path = next(p for p in branch.writers if weights(layer, (p,)))
            statistics = sensitivity.writers.get(f"{decoder.layer_path(index)}.{path}", ())
            if branch.activation is not None and channels:
                cuts = LayerCuts(_fit_channels(layer, branch, statistics, channels), cuts.values)
            elif branch.activation is None and values:
                cuts = LayerCuts(cuts.channels, _fit_values(layer, branch, statistics[0], decoder.heads, values))
        found.append(cuts)
    return found


def _fit_channels(layer: nn.Module, branch: Branch, statistics: Statistics, step: int) -> ChannelCut:
    (writer,) = weights(layer, branch.writers)
    fitted = [
        eliminate(matrix.T, each.inputs, each.gradients, step=step)
        for matrix, each in zip(_stack(writer), statistics, strict=True)
    ]
    orders, curves = zip(*fitted, strict=True)
    return ChannelCut(total(curves), orders, tuple(each.inputs.cpu() for each in statistics))


def _fit_values(layer: nn.Module, branch: Branch, statistics: WriterStatistics, heads: Heads, step: int) -> ValueCut:
    (reader, source), (writer,) = value_reader(layer, branch), weights(layer, branch.writers)
    gain = None
    if source.bias is not None:
        bias = torch.cat([source.bias[r.start : r.stop] for r in heads.rows(reader, "value")])
        statistics, gain = fold_bias(statistics, writer.matrix.T, bias, head_dim=heads.size)
    bases, curve = principal_values(
        writer.matrix.T, statistics.inputs, statistics.gradients, heads=heads.values, head_dim=heads.size, step=step
    )
    return ValueCut(curve, bases, statistics.inputs.cpu(), gain)


@torch.inference_mode(False)  # its weights could not be trained
@torch.no_grad()
def cut_model(
    model: PreTrainedModel, cuts: Sequence[LayerCuts], channels: tuple[int, ...], values: tuple[int, ...]
) -> PreTrainedModel:
    """Return a copy of the dense ``model`` whose decoder layers have these sizes; empty tuples leave an axis alone."""
    dense = Decoder(model)
    cut = empty_copy(model)
    narrow = Decoder(cut)
    narrow_layers_(narrow, channels, values)
    for site, sublayer in dense.sublayers():
        layer, fitted = narrow.layers[site.index], cuts[site.index]
        for branch in sublayer.branches:
            if _shapes(layer, branch) == _shapes(site.part, branch):
                continue
            if branch.activation is not None and fitted.channels is not None:
                fitted.channels.fill_(layer, site.part, branch, channels[site.index])
            elif fitted.values is not None:
                fitted.values.fill_(layer, site.part, branch, dense.heads, values[site.index])
    copy_rest_(cut, model)
    cut.tie_weights()
    return cut


def _shapes(layer: nn.Module, branch: Branch) -> list[torch.Size]:
    return [weight.matrix.shape for weight in weights(layer, branch.writers)]


def _stack(weight: Weight) -> list[Tensor]:
    """The matrices [out, in] of a weight: one, or one per expert."""
    return [*weight.matrix] if weight.matrix.ndim == 3 else [weight.matrix]


def _unstack(matrices: list[Tensor], like: Weight) -> Tensor:
    return torch.stack(matrices) if like.matrix.ndim == 3 else matrices[0]


def _replaced(rows: Tensor, ranges: Sequence[range], by: Sequence[Tensor]) -> Tensor:
    """``rows`` with each of the ascending ``ranges`` replaced."""
    parts, end = [], 0
    for replaced, new in zip(ranges, by, strict=True):
        parts += [rows[end : replaced.start], new.to(rows.dtype)]
        end = replaced.stop
    return torch.cat([*parts, rows[end:]])
