"""The basis plan: which basis each norm site uses and how many of its directions are kept. A plan is data.

Norm sites are counted along the residual stream: those of the decoder layers (attention and MLP, or one where they run
in parallel), then the final norm. Between two sites of different bases the residual path carries a shortcut, the
product of the two bases.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from slicegpt_fast.architectures import Axis, Decoder, at, weights
from slicegpt_fast.errors import InputError, is_whole
from slicegpt_fast.quantization import count_parameters
from slicegpt_fast.slicing.cuts.narrow import channels_of
from slicegpt_fast.slicing.options import Basis, Shortcut, Signal, SliceOptions
from slicegpt_fast.slicing.trust import check_trusted


@dataclass(frozen=True)
class SlicePlan:
    """A basis plan for a model of ``full_width`` D and S norm sites.

    Attributes:
        basis: ``"per-norm"`` (one basis per site: arXiv 2401.15024), ``"shared"`` (one for the model), or k groups;
            None leaves the stream as it is, of full width.
        signal: what the covariance is of: the norm's input (``"raw"``) or its weightless output (``"normalized"``).
        full_width: D, the hidden size before slicing and the divisor of every norm after it.
        widths: [S] the kept size d of each site.
        groups: [S] the index of the basis each site uses; consecutive sites share one.
        shortcut: ``"dense"`` matrices, or ``"aligned"`` ones, the identity minus a low rank.
        shortcut_rank: where aligned shortcuts are truncated; None keeps them exact.
        channels: per decoder layer, how many channels its MLP keeps; empty where none are cut.
        values: per decoder layer, the rank of its attention's values; empty where none are cut.
        tied: the head stays the embedding table, of width D, with a map of the stream before it and one behind it:
            E M^T and (norm(h) M'^T) E^T in place of two narrow tables.
    """

    basis: Basis | None
    signal: Signal
    full_width: int
    widths: tuple[int, ...]
    groups: tuple[int, ...]
    shortcut: Shortcut = "dense"
    shortcut_rank: int | None = None
    channels: tuple[int, ...] = ()
    values: tuple[int, ...] = ()
    tied: bool = False

    def sizes(self, axis: Axis) -> tuple[int, ...]:
        """Return the sizes kept along an axis: of each site, or of each decoder layer where any of it is cut."""
        return {"stream": self.widths, "channels": self.channels, "values": self.values}[axis]

    @property
    def cuts(self) -> bool:
        """Whether anything is cut at all: weights of fewer bits may be all that a model has of its own."""
        return self.basis is not None or self.cuts_layers

    @property
    def cuts_layers(self) -> bool:
        """Whether anything but the residual stream is cut."""
        return bool(self.channels or self.values)

    def has_shortcut(self, site: int) -> bool:
        """Whether the stream changes its basis between ``site`` and the next one."""
        return self.groups[site] != self.groups[site + 1]

    def rank(self, site: int) -> int | None:
        """The rank of the aligned shortcut behind ``site``, None where it is dense.

        At least d + d' - D singular values of ``Q^T Q'`` are 1, so D - d' is enough. A stream that narrows has no
        identity to be close to.
        """
        width, following = self.widths[site], self.widths[site + 1]
        if self.shortcut == "dense" or following < width:
            return None
        exact = min(width, self.full_width - following)
        return exact if self.shortcut_rank is None else min(exact, self.shortcut_rank)

    def shortcut_parameters(self, site: int) -> int:
        """How many parameters the shortcut behind ``site`` stores."""
        if not self.has_shortcut(site):
            return 0
        width, rank = self.widths[site], self.rank(site)
        return width * self.widths[site + 1] if rank is None else 2 * width * rank


def make_plan(model: PreTrainedModel, options: SliceOptions) -> SlicePlan:
    """Return the plan that ``options`` ask for, of one kept size unless they list the sizes.

    Raises:
        InputError: ``model`` cannot be sliced, the options do not fit it, or no size meets them.
    """
    decoder = Decoder(model)
    check_sliceable(decoder)
    full, sites = decoder.width, len(decoder.sites)
    step = options.step(model.device)
    groups = _groups(options.stream_basis, sites, options.slices_head)

    def plan(*sizes: int) -> SlicePlan:
        if decoder.architecture.keeps_width and len(set(sizes)) > 1:
            raise InputError(
                f"the code of {model.config.model_type} models holds the stream to one width: use slice_head=True."
            )
        basis, rank = _plain(options.stream_basis), _plain(options.shortcut_rank)
        return SlicePlan(basis, options.signal, full, sizes, groups, options.shortcut, rank)

    def uniform(width: int) -> SlicePlan:
        return plan(*[width] * (sites - 1), width if options.slices_head else full)

    if options.widths is not None:
        made = plan(*map(_plain, options.widths))
        check_plan(made, decoder)
        return made
    if (sparsity := options.sparsity) is not None:
        # The published rounding, int((1 - s) D) down to a multiple, guarded against 0.9 * 640 = 575.99...
        kept = math.floor((1 - sparsity) * full + 1e-6)
        width = full if sparsity == 0 else kept - kept % step
        if width == 0:
            raise InputError(
                f"sparsity {sparsity} keeps {kept} of {full} directions, which round_to={step} rounds to zero: "
                "lower one of them."
            )
        return uniform(width)

    assert options.target_params is not None
    budget, count = options.target_params * _block_parameters(decoder), parameter_counter(decoder)
    plans = [uniform(width) for width in (*range(step, full, step), full)]
    fitting = [made for made in plans if count(made) <= budget]
    if not fitting:
        smallest = count(plans[0]) / _block_parameters(decoder)
        raise InputError(
            f"target_params {options.target_params} cannot be met: the smallest slice (d={plans[0].widths[0]}) still "
            f"stores {smallest:.3f} of the decoder blocks' parameters."
        )
    return fitting[-1]


def uncut_plan(decoder: Decoder) -> SlicePlan:
    """Return the plan that leaves a dense model as it is."""
    sites = len(decoder.sites)
    return SlicePlan(None, "normalized", decoder.width, (decoder.width,) * sites, (0,) * sites)


def fit_widths(model: PreTrainedModel, plan: SlicePlan, spectra: Tensor, options: SliceOptions) -> SlicePlan:
    """Give every basis of ``plan`` a size of its own: the same share of its variance, within a budget.

    Args:
        model: the dense model.
        plan: any plan with the wanted groups.
        spectra: [number of bases, D] descending eigenvalues.
        options: give the budget, ``target_params``, and what sizes are rounded up to.

    Raises:
        InputError: the code of the family wants one width, or no share of the variance meets the budget.
    """
    decoder = Decoder(model)
    full = plan.full_width
    explained = spectra.cumsum(1) / spectra.sum(1, keepdim=True)
    step = options.step(model.device)
    if decoder.architecture.keeps_width:
        raise InputError(
            f"the code of {model.config.model_type} models holds the stream to one width: use schedule='uniform'."
        )
    assert options.target_params is not None
    budget, count = options.target_params * _block_parameters(decoder), parameter_counter(decoder)

    def at_share(share: float) -> SlicePlan:
        needed = (explained < share).sum(1) + 1
        sizes = [min(full, math.ceil(int(size) / step) * step) for size in needed]
        sizes = [sizes[group] for group in plan.groups]
        return replace(plan, widths=(*sizes[:-1], sizes[-1] if options.slices_head else full))

    low, high = 0.0, 1.0
    if count(at_share(low)) > budget:
        raise InputError(f"target_params {options.target_params} cannot be met by any share of the variance: raise it.")
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if count(at_share(middle)) <= budget else (low, middle)
    return at_share(low)


def block_parameters(model: PreTrainedModel) -> int:
    """Number of parameters stored in the decoder layers, shortcuts included, embeddings and head not."""
    return _block_parameters(Decoder(model))


def _block_parameters(decoder: Decoder) -> int:
    return sum(map(count_parameters, decoder.layers))


def parameter_counter(decoder: Decoder) -> Callable[[SlicePlan], int]:
    """Return a function that counts the decoder blocks' stored parameters after slicing a dense model by a plan.

    With r_s readers' rows and w_s writers' columns (one more for a bias) at site s, the blocks store
    ``fixed + sum_s r_s d_s + w_s d_{s+1} + shortcut_s``.
    """
    full = decoder.width
    rows, columns = [], []
    fixed = _block_parameters(decoder)
    for site, sublayer in decoder.sublayers():
        layer = site.part
        rows.append(0)
        columns.append(0)
        for branch in sublayer.branches:
            norm_bias = getattr(at(layer, branch.norm), "bias", None)
            for reader in weights(layer, branch.readers):
                rows[-1] += reader.matrix.numel() // full
                if norm_bias is not None and reader.bias is None:
                    fixed += reader.matrix.shape[-2]
            for writer in weights(layer, branch.writers):
                columns[-1] += writer.matrix.numel() // full + (writer.bias is not None)
        for norm in {branch.norm for branch in sublayer.branches}:
            fixed -= sum(parameter.numel() for parameter in at(layer, norm).parameters())
    fixed -= (sum(rows) + sum(columns)) * full

    def count(plan: SlicePlan) -> int:
        total = fixed
        for site, (reading, writing) in enumerate(zip(rows, columns, strict=True)):
            total += reading * plan.widths[site] + writing * plan.widths[site + 1] + plan.shortcut_parameters(site)
        return total

    return count


def check_plan(plan: SlicePlan, decoder: Decoder) -> None:
    """Raise InputError unless ``plan`` is one for a model of this depth and hidden size."""
    sites, full = len(decoder.sites), decoder.width
    if not (isinstance(plan.widths, tuple) and isinstance(plan.groups, tuple)):
        raise InputError(
            f"the quantization_config of a sliced model gives widths and groups as lists, not {plan.widths!r} and "
            f"{plan.groups!r}: the config was changed."
        )
    fits = (
        plan.full_width == full
        and len(plan.widths) == len(plan.groups) == sites
        and all(is_whole(width) and 0 < width <= full for width in plan.widths)
        and all(isinstance(group, int) for group in plan.groups)
        and len(set(zip(plan.groups, plan.widths, strict=True))) == len(set(plan.groups))
    )
    if not fits:
        raise InputError(
            f"the plan (widths, or the quantization_config of a sliced model) has {len(plan.widths)} sizes and does "
            f"not fit a model of {sites} norm sites and hidden size {full}: give every site a size of 1 to {full}, the "
            "same within a group."
        )
    if plan.basis is None and set(plan.widths) != {full}:
        raise InputError(
            f"the plan has no basis, which leaves the stream at {full}, but a size of {min(plan.widths)}: the config "
            "was changed."
        )
    if plan.tied is not False and not (plan.tied is True and decoder.may_stay_tied and plan.basis is not None):
        raise InputError(
            f"the plan (the quantization_config of a sliced model) gives tied {plan.tied!r}, which takes a model whose "
            "head is its embedding table, and a sliced stream: the config was changed."
        )
    for name, largest in dense_sizes(decoder).items():
        sizes = plan.sizes(name)
        if sizes != () and not (
            isinstance(sizes, tuple)
            and len(sizes) == len(largest)
            and all(is_whole(size) and 0 < size <= most for size, most in zip(sizes, largest, strict=True))
        ):
            raise InputError(
                f"the plan (the quantization_config of a sliced model) gives {name} {sizes!r}, which does not fit "
                f"{len(largest)} layers of up to {max(largest)}: the config was changed, or belongs to another model."
            )


def dense_sizes(decoder: Decoder) -> dict[Axis, list[int]]:
    """Return the size of each decoder layer of a dense model along the axes that have one per layer."""
    return {"channels": channels_of(decoder), "values": [decoder.heads.size] * len(decoder.layers)}


def _groups(basis: Basis, sites: int, head_is_sliced: bool) -> tuple[int, ...]:
    """The basis of each site: k consecutive groups of equal length; a head that is not sliced has its own."""
    sliced = sites if head_is_sliced else sites - 1
    number = {"per-norm": sliced, "shared": 1}.get(basis) if isinstance(basis, str) else basis
    if not is_whole(number) or not 1 <= number <= sliced:
        raise InputError(f"basis must be 'per-norm', 'shared' or a number of groups from 1 to {sliced}, not {basis!r}.")
    number = int(number)
    groups = [site * number // sliced for site in range(sliced)]
    return tuple(groups if head_is_sliced else [*groups, number])


def _plain(number: Any) -> Any:
    """Numpy's integers as Python's, which a config can hold; anything else as it is."""
    return int(number) if is_whole(number) else number


def check_sliceable(decoder: Decoder) -> None:
    """Raise InputError unless a model can be sliced: a dense one of plain layers, on one device."""
    model = decoder.model
    block = getattr(model.config, "quantization_config", None)
    method = getattr(block, "quant_method", block.get("quant_method") if isinstance(block, dict) else None)
    if method == "slicegpt":
        raise InputError("the model is sliced or quantised already: slice the dense model it was made from.")
    if method is not None:
        raise InputError(
            f"the model is quantised ({method}): slice the unquantised model with basis='shared', export it, and "
            "quantise that."
        )
    devices = {str(parameter.device) for parameter in model.parameters()}
    if len(devices) > 1:
        raise InputError(
            f"the model is spread over several devices ({', '.join(sorted(devices))}): load it on one device, or slice "
            "from file to file with slice_checkpoint."
        )
    for name, parameter in model.named_parameters():
        if parameter.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            raise InputError(f"{name} has dtype {parameter.dtype}: load the model in float32, bfloat16 or float16.")
    check_trusted(decoder)
