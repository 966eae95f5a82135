"""The basis plan: which basis each norm site uses and how many of its directions are kept. A plan is data.

Norm sites are counted along the residual stream: those of the decoder layers (attention and MLP, or one where they run
in parallel), then the final norm. Between two sites of different bases the residual path carries a shortcut, the
product of the two bases.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeGuard

import torch
from torch import Tensor
from transformers import PreTrainedModel

from slicegpt_fast.architectures import Architecture, architecture_of, at, weights
from slicegpt_fast.errors import InputError, check_choice
from slicegpt_fast.kernels.regimes import TILE
from slicegpt_fast.slicing.trust import check_trusted

Basis = Literal["per-norm", "shared"] | int
Signal = Literal["raw", "normalized"]
Shortcut = Literal["dense", "aligned"]
Schedule = Literal["uniform", "variance"]


@dataclass(frozen=True)
class SlicePlan:
    """A basis plan for a model of ``full_width`` D and S norm sites.

    Attributes:
        basis: ``"per-norm"`` (one basis per site: arXiv 2401.15024), ``"shared"`` (one for the model), or k groups.
        signal: what the covariance is of: the norm's input (``"raw"``) or its weightless output (``"normalized"``).
        full_width: D, the hidden size before slicing and the divisor of every norm after it.
        widths: [S] the kept size d of each site.
        groups: [S] the index of the basis each site uses; consecutive sites share one.
        shortcut: ``"dense"`` matrices, or ``"aligned"`` ones, the identity minus a low rank.
        shortcut_rank: where aligned shortcuts are truncated; None keeps them exact.
    """

    basis: Basis
    signal: Signal
    full_width: int
    widths: tuple[int, ...]
    groups: tuple[int, ...]
    shortcut: Shortcut = "dense"
    shortcut_rank: int | None = None

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


def make_plan(
    model: PreTrainedModel,
    *,
    sparsity: float | None = None,
    target_params: float | None = None,
    widths: Sequence[int] | None = None,
    basis: Basis = "per-norm",
    signal: Signal = "raw",
    shortcut: Shortcut = "dense",
    shortcut_rank: int | None = None,
    round_to: int | Literal["auto"] = 8,
    slice_head: bool = False,
) -> SlicePlan:
    """Choose one kept size for ``model``; the arguments are those of :func:`slicegpt_fast.slice_model`.

    Raises:
        InputError: an argument is out of range, not exactly one of ``sparsity``, ``target_params`` and ``widths`` is
            given, or no size meets them.
    """
    architecture = architecture_of(model)
    _check_sliceable(model, architecture)
    full = model.config.hidden_size
    sites = sum(1 for _ in architecture.sites(model)) + 1
    step = _round_to(round_to, model)
    check_choice("signal", signal, Signal)
    check_choice("shortcut", shortcut, Shortcut)
    if shortcut_rank is not None and (shortcut == "dense" or not _is_whole(shortcut_rank) or shortcut_rank < 0):
        raise InputError(f"shortcut_rank truncates shortcut='aligned' to a rank of 0 or more, not {shortcut_rank!r}.")
    if sum(value is not None for value in (sparsity, target_params, widths)) != 1:
        raise InputError("give exactly one of sparsity, target_params and widths.")
    for name, share in {"sparsity": sparsity, "target_params": target_params}.items():
        if not isinstance(share, int | float | None):
            raise InputError(f"{name} must be a number, not {share!r}.")
    if not isinstance(widths, Sequence | None):
        raise InputError(f"widths must be a list with the size of every norm site, not {widths!r}.")
    head_is_sliced = slice_head or basis == "shared"
    groups = _groups(basis, sites, head_is_sliced)

    def plan(*sizes: int) -> SlicePlan:
        if architecture.keeps_width and len(set(sizes)) > 1:
            raise InputError(
                f"the code of {model.config.model_type} models holds the stream to one width: use slice_head=True."
            )
        return SlicePlan(basis, signal, full, sizes, groups, shortcut, shortcut_rank)

    def uniform(width: int) -> SlicePlan:
        return plan(*[width] * (sites - 1), width if head_is_sliced else full)

    if widths is not None:
        made = plan(*widths)
        check_plan(made, model)
        return made
    if sparsity is not None:
        if not 0 <= sparsity < 1:
            raise InputError(f"sparsity must be at least 0 and below 1, not {sparsity}.")
        # The published rounding, int((1 - s) D) down to a multiple, guarded against 0.9 * 640 = 575.99...
        kept = math.floor((1 - sparsity) * full + 1e-6)
        width = full if sparsity == 0 else kept - kept % step
        if width == 0:
            raise InputError(
                f"sparsity {sparsity} keeps {kept} of {full} directions, which round_to={step} rounds to zero: "
                "lower one of them."
            )
        return uniform(width)

    assert target_params is not None
    budget = _budget(model, target_params)
    count = parameter_counter(model, architecture)
    plans = [uniform(width) for width in (*range(step, full, step), full)]
    fitting = [made for made in plans if count(made) <= budget]
    if not fitting:
        smallest = count(plans[0]) / block_parameters(model)
        raise InputError(
            f"target_params {target_params} cannot be met: the smallest slice (d={plans[0].widths[0]}) still stores "
            f"{smallest:.3f} of the decoder blocks' parameters."
        )
    return fitting[-1]


def fit_widths(
    model: PreTrainedModel,
    plan: SlicePlan,
    spectra: Tensor,
    target_params: float,
    *,
    round_to: int | str,
    slice_head: bool,
) -> SlicePlan:
    """Give every basis of ``plan`` a size of its own: the same share of its variance, within a budget.

    Args:
        model: the dense model.
        plan: any plan with the wanted groups.
        spectra: [number of bases, D] descending eigenvalues.
        target_params: the decoder blocks' stored parameters, as a share of the dense ones.
        round_to, slice_head: as in :func:`make_plan`; sizes are rounded up.

    Raises:
        InputError: the code of the family wants one width, or no share of the variance meets the budget.
    """
    architecture = architecture_of(model)
    full = plan.full_width
    explained = spectra.cumsum(1) / spectra.sum(1, keepdim=True)
    head_is_sliced = slice_head or plan.basis == "shared"
    step = _round_to(round_to, model)
    if architecture.keeps_width:
        raise InputError(
            f"the code of {model.config.model_type} models holds the stream to one width: use schedule='uniform'."
        )
    budget, count = _budget(model, target_params), parameter_counter(model, architecture)

    def at_share(share: float) -> SlicePlan:
        needed = (explained < share).sum(1) + 1
        sizes = [min(full, math.ceil(int(size) / step) * step) for size in needed]
        sizes = [sizes[group] for group in plan.groups]
        return replace(plan, widths=(*sizes[:-1], sizes[-1] if head_is_sliced else full))

    low, high = 0.0, 1.0
    if count(at_share(low)) > budget:
        raise InputError(f"target_params {target_params} cannot be met by any share of the variance: raise it.")
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if count(at_share(middle)) <= budget else (low, middle)
    return at_share(low)


def block_parameters(model: PreTrainedModel) -> int:
    """Number of parameters stored in the decoder layers, shortcuts included, embeddings and head not."""
    layers = at(model, architecture_of(model).layers)
    return sum(parameter.numel() for parameter in layers.parameters())


def parameter_counter(model: PreTrainedModel, architecture: Architecture) -> Callable[[SlicePlan], int]:
    """Return a function that counts the decoder blocks' stored parameters after slicing the dense ``model`` by a plan.

    With r_s readers' rows and w_s writers' columns (one more for a bias) at site s, the blocks store
    ``fixed + sum_s r_s d_s + w_s d_{s+1} + shortcut_s``.
    """
    full = model.config.hidden_size
    rows, columns = [], []
    fixed = block_parameters(model)
    for _, layer, sublayer in architecture.sites(model):
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


def check_plan(plan: SlicePlan, model: PreTrainedModel) -> None:
    """Raise InputError unless ``plan`` is one for a model of this depth and hidden size."""
    sites = sum(1 for _ in architecture_of(model).sites(model)) + 1
    full = model.config.hidden_size
    fits = (
        plan.full_width == full
        and len(plan.widths) == len(plan.groups) == sites
        and all(_is_whole(width) and 0 < width <= full for width in plan.widths)
        and all(isinstance(group, int) for group in plan.groups)
        and len(set(zip(plan.groups, plan.widths, strict=True))) == len(set(plan.groups))
    )
    if not fits:
        raise InputError(
            f"the plan (widths, or the quantization_config of a sliced model) has {len(plan.widths)} sizes and does "
            f"not fit a model of {sites} norm sites and hidden size {full}: give every site a size of 1 to {full}, the "
            "same within a group."
        )


def _groups(basis: Basis, sites: int, head_is_sliced: bool) -> tuple[int, ...]:
    """The basis of each site: k consecutive groups of equal length; a head that is not sliced has its own."""
    sliced = sites if head_is_sliced else sites - 1
    number = {"per-norm": sliced, "shared": 1}.get(basis, basis)  # type: ignore[arg-type]
    if not isinstance(number, int) or isinstance(basis, bool) or not 1 <= number <= sliced:
        raise InputError(f"basis must be 'per-norm', 'shared' or a number of groups from 1 to {sliced}, not {basis!r}.")
    groups = [site * number // sliced for site in range(sliced)]
    return tuple(groups if head_is_sliced else [*groups, number])


def _is_whole(number: object) -> TypeGuard[int]:
    return isinstance(number, int) and not isinstance(number, bool)


def _round_to(round_to: int | str, model: PreTrainedModel) -> int:
    if round_to == "auto":
        return TILE.get(model.device.type, TILE["cpu"])
    if not _is_whole(round_to) or round_to < 1:
        raise InputError(f"round_to must be 'auto' or a whole number of at least 1, not {round_to!r}.")
    return round_to


def _budget(model: PreTrainedModel, target_params: float) -> float:
    if not 0 < target_params <= 1:
        raise InputError(f"target_params must be above 0 and at most 1, not {target_params}.")
    return target_params * block_parameters(model)


def _check_sliceable(model: PreTrainedModel, architecture: Architecture) -> None:
    block = getattr(model.config, "quantization_config", None)
    method = getattr(block, "quant_method", block.get("quant_method") if isinstance(block, dict) else None)
    if method == "slicegpt":
        raise InputError("the model is sliced already: slice the dense model it was made from.")
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
    for index, layer, sublayer in architecture.sites(model):
        for branch in sublayer.branches:
            for weight in weights(layer, branch.readers + branch.writers):
                if weight.name not in weight.owner._parameters:
                    kind = type(weight.owner)
                    raise InputError(
                        f"{architecture.layers}.{index}.{branch.modules[0]} holds a {kind.__module__}.{kind.__name__}, "
                        "not a plain linear layer: merge adapters before slicing."
                    )
    check_trusted(model, architecture)
