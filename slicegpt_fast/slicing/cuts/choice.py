"""Which sizes a budget buys: the curves of all layers' cuts, what their sizes store, and the best allocation.

An allocation counts what a size stores as if all of it were proportional to the size. A few vectors are not: the biases
that take in a value bias or a norm's, and the norms that lose their weights. What a plan stores is therefore counted on
its outline, and a plan that exceeds the budget is made again with that much less.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from slicegpt_fast.architectures import Branch, Decoder, Site, weights
from slicegpt_fast.errors import InputError
from slicegpt_fast.slicing.cuts.allocation import Allocation, Cost, Cut, allocate
from slicegpt_fast.slicing.cuts.curve import Curve, total
from slicegpt_fast.slicing.cuts.cutting import LayerCuts
from slicegpt_fast.slicing.cuts.narrow import channel_readers, value_reader
from slicegpt_fast.slicing.layers import empty_copy, narrow_
from slicegpt_fast.slicing.options import Basis, Budget
from slicegpt_fast.slicing.plan import SlicePlan


@dataclass(frozen=True)
class Sizes:
    """What the decoder layers keep.

    Attributes:
        width: of the residual stream.
        channels, values: per layer; empty where the axis is not cut.
        stored: what the budget counts, as a share of the dense layers'.
        loss: the predicted increase of the loss per token, in nats.
    """

    width: int
    channels: tuple[int, ...]
    values: tuple[int, ...]
    stored: float
    loss: float

    def plan(self, decoder: Decoder) -> SlicePlan:
        """Return the plan that gives a dense model these sizes."""
        sites = len(decoder.sites)
        basis: Basis | None = None if self.width == decoder.width else "shared"
        widths = (self.width,) * sites
        return SlicePlan(
            basis,
            "normalized",
            decoder.width,
            widths,
            (0,) * sites,
            channels=self.channels,
            values=self.values,
            tied=basis is not None and decoder.is_tied and decoder.may_stay_tied,
        )


def choose_sizes(
    decoder: Decoder,
    fitted: Sequence[LayerCuts],
    stream: Curve,
    share: float,
    *,
    budget: Budget = "params",
    uniform: bool = False,
) -> list[Sizes]:
    """Return the best sizes within a budget for each width of the stream, the lowest predicted loss first.

    Args:
        decoder: the dense model.
        fitted: the cuts of its layers.
        stream: predicted loss against the stream's width, for the widths to try.
        share: what the decoder layers may store, as a share of the dense ones.
        budget: what is counted: parameters, their bytes, or the FLOPs that a token costs.
        uniform: one size for all layers, along each axis.

    Raises:
        InputError: the smallest sizes exceed the budget, or ``uniform`` sizes are asked of layers that differ.
    """
    count = _counter(decoder, budget)
    names = [name for name in ("channels", "values") if any(getattr(layer, name) is not None for layer in fitted)]
    cuts = [
        (name, _unit(decoder, site, branch, count), getattr(fitted[site.index], name).curve)
        for name in names
        for site, branch in _branches(decoder, name)
    ]
    dense = _counted(decoder, count)
    movable = sum(unit.at(decoder.width) * curve.sizes[0] for _, unit, curve in cuts)
    vectors = _vectors(decoder, count) - sum(unit.vectors * curve.sizes[0] for _, unit, curve in cuts)
    fixed = Cost(vectors, dense - movable - vectors * decoder.width)
    groups = [[cut for cut in cuts if cut[0] == name] for name in names] if uniform else [[cut] for cut in cuts]
    choices = [_together(group) for group in groups]
    limit = int(share * dense)

    def within(allocation: Allocation) -> Sizes:
        """The sizes of an allocation, or of those after it that meet the budget."""
        left, point = limit, Curve((allocation.width,), (stream.loss(allocation.width),))
        while True:
            sizes = _sizes(allocation, names, len(decoder.layers), uniform)
            outline = empty_copy(decoder.model)
            narrow_(outline, sizes.plan(decoder))
            stored = _counted(Decoder(outline), count)
            if stored <= limit:
                return replace(sizes, stored=stored / dense)
            left -= stored - limit
            (allocation,) = allocate(choices, point, fixed, left)

    found = []
    for allocation in allocate(choices, stream, fixed, limit):
        try:
            found.append(within(allocation))
        except InputError as error:
            refusal = error
    if not found:
        raise refusal
    return sorted(found, key=lambda sizes: sizes.loss)


def _counted(decoder: Decoder, count: Callable[[Tensor], float]) -> int:
    """What the decoder layers count for."""
    return round(sum(count(parameter) for layer in decoder.layers for parameter in layer.parameters()))


def _sizes(allocation: Allocation, names: list[str], layers: int, uniform: bool) -> Sizes:
    repeat = layers if uniform else 1
    sizes = [size for size in allocation.sizes for _ in range(repeat)]
    per_name = {name: tuple(sizes[i * layers : (i + 1) * layers]) for i, name in enumerate(names)}
    return Sizes(allocation.width, per_name.get("channels", ()), per_name.get("values", ()), 1.0, allocation.loss)


def _together(group: list[tuple[str, Cost, Curve]]) -> Cut:
    """One choice for all of a group: the sum of their curves and costs."""
    full = sorted({curve.sizes[0] for _, _, curve in group})
    if len(full) > 1:
        raise InputError(
            f"uniform=True gives all layers one size, but theirs differ ({group[0][0]}: {', '.join(map(str, full))}): "
            "leave it out."
        )
    units = [unit for _, unit, _ in group]
    cost = Cost(sum(unit.vectors for unit in units), sum(unit.scalars for unit in units))
    return Cut(total([curve for _, _, curve in group]), cost)


def _branches(decoder: Decoder, name: str) -> list[tuple[Site, Branch]]:
    """The feed-forward network, or the attention, of every layer."""
    return [
        (site, branch)
        for site, sublayer in decoder.sublayers()
        for branch in sublayer.branches
        if (branch.activation is not None) == (name == "channels")
    ]


def _unit(decoder: Decoder, site: Site, branch: Branch, count: Callable[[Tensor], float]) -> Cost:
    """What one channel, or one dimension of all heads' values, stores."""
    heads, layer = decoder.heads, site.part
    writers = weights(layer, branch.writers)
    if branch.activation is None:
        reader, weight = value_reader(layer, branch)
        vectors = (heads.queries + heads.values) * count(weight.matrix) / weight.matrix.numel()
        biased = weight.bias is not None and reader.outputs != ("value",)
        return Cost(round(vectors), round(heads.values * _each(weight.bias, count)) if biased else 0)
    readers = [(reader, weight) for reader, weight in channel_readers(layer, branch)]
    channels = writers[0].matrix.shape[-1]
    stored = sum(count(weight.matrix) for weight in [*(w for _, w in readers), *writers])
    scalars = sum(len(reader.outputs) * _each(weight.bias, count) for reader, weight in readers)
    return Cost(round(stored / channels / decoder.width), round(scalars))


def _each(bias: Tensor | None, count: Callable[[Tensor], float]) -> float:
    """What an entry of a bias counts for; nothing where there is none."""
    return 0.0 if bias is None else count(bias) / bias.numel()


def _vectors(decoder: Decoder, count: Callable[[Tensor], float]) -> int:
    """How many vectors of the stream's width the layers' readers and writers are made of."""
    return round(
        sum(
            count(weight.matrix) / decoder.width
            for site, sublayer in decoder.sublayers()
            for branch in sublayer.branches
            for weight in weights(site.part, branch.readers + branch.writers)
        )
    )


def _counter(decoder: Decoder, budget: Budget) -> Callable[[Tensor], float]:
    """What a parameter counts for."""
    row, config = decoder.architecture, decoder.model.config
    if budget == "bytes":
        return lambda parameter: parameter.numel() * parameter.element_size()
    if budget == "flops":
        return lambda parameter: (
            0
            if parameter.ndim < 2
            else 2 * parameter.numel() * (row.experts_of(config) / len(parameter) if parameter.ndim == 3 else 1)
        )
    return lambda parameter: parameter.numel()
