"""The basis plan: which basis each norm site uses and how many of its directions are kept. A plan is data.

Norm sites are counted along the residual stream: two per decoder layer (attention, MLP), then the final norm. Between
two sites of different bases the residual path carries a shortcut, the product of the two bases.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from transformers import PreTrainedModel

from slicegpt_fast.architectures import Architecture, architecture_of, at, weights
from slicegpt_fast.errors import InputError

Basis = Literal["per-norm", "shared"]
Signal = Literal["raw", "normalized"]


@dataclass(frozen=True)
class SlicePlan:
    """A basis plan for a model of ``full_width`` D and S norm sites.

    Attributes:
        basis: ``"per-norm"`` (one per site, dense shortcuts: arXiv 2401.15024) or ``"shared"`` (one for the model).
        signal: what the covariance is of: the norm's input (``"raw"``) or its weightless output (``"normalized"``).
        full_width: D, the hidden size before slicing and the divisor of every norm after it.
        widths: [S] the kept size d of each site.
        groups: [S] the index of the basis each site uses.
    """

    basis: Basis
    signal: Signal
    full_width: int
    widths: tuple[int, ...]
    groups: tuple[int, ...]

    def has_shortcut(self, site: int) -> bool:
        """Whether the stream changes its basis between ``site`` and the next one."""
        return self.groups[site] != self.groups[site + 1]


def make_plan(
    model: PreTrainedModel,
    *,
    sparsity: float | None = None,
    target_params: float | None = None,
    basis: Basis = "per-norm",
    signal: Signal = "raw",
    round_to: int = 8,
    slice_head: bool = False,
) -> SlicePlan:
    """Choose the kept sizes for ``model``; the arguments are those of :func:`slicegpt_fast.slice_model`.

    Raises:
        InputError: an argument is out of range, both or neither of ``sparsity`` and ``target_params`` are given, or no
            size meets them.
    """
    architecture = architecture_of(model)
    _check_sliceable(model, architecture)
    full = model.config.hidden_size
    for name, value, allowed in (("basis", basis, get_args(Basis)), ("signal", signal, get_args(Signal))):
        if value not in allowed:
            raise InputError(f"{name} must be one of {', '.join(map(repr, allowed))}, not {value!r}.")
    if (sparsity is None) == (target_params is None):
        raise InputError("give exactly one of sparsity and target_params.")
    if round_to < 1:
        raise InputError(f"round_to must be at least 1, not {round_to}.")

    sites = sum(1 for _ in architecture.sites(model)) + 1

    def plan(width: int) -> SlicePlan:
        if basis == "shared":
            return SlicePlan(basis, signal, full, (width,) * sites, (0,) * sites)
        widths = (width,) * (sites - 1) + (width if slice_head else full,)
        if architecture.keeps_width and len(set(widths)) > 1:
            raise InputError(
                f"the code of {model.config.model_type} models holds the stream to one width: use slice_head=True."
            )
        return SlicePlan(basis, signal, full, widths, tuple(range(sites)))

    if sparsity is not None:
        if not 0 <= sparsity < 1:
            raise InputError(f"sparsity must be at least 0 and below 1, not {sparsity}.")
        # The published rounding, int((1 - s) D) down to a multiple, guarded against 0.9 * 640 = 575.99...
        kept = math.floor((1 - sparsity) * full + 1e-6)
        width = full if sparsity == 0 else kept - kept % round_to
        if width == 0:
            raise InputError(
                f"sparsity {sparsity} keeps {kept} of {full} directions, which round_to={round_to} rounds to zero: "
                "lower one of them."
            )
        return plan(width)

    assert target_params is not None
    if not 0 < target_params <= 1:
        raise InputError(f"target_params must be above 0 and at most 1, not {target_params}.")
    budget = target_params * block_parameters(model)
    count = parameter_counter(model, architecture)
    sizes = [*range(round_to, full, round_to), full]
    fitting = [size for size in sizes if count(plan(size)) <= budget]
    if not fitting:
        smallest = count(plan(sizes[0])) / block_parameters(model)
        raise InputError(
            f"target_params {target_params} cannot be met: the smallest slice (d={sizes[0]}) still stores "
            f"{smallest:.3f} of the decoder blocks' parameters."
        )
    return plan(fitting[-1])


def block_parameters(model: PreTrainedModel) -> int:
    """Number of parameters stored in the decoder layers, shortcuts included, embeddings and head not."""
    layers = at(model, architecture_of(model).layers)
    return sum(parameter.numel() for parameter in layers.parameters())


def parameter_counter(model: PreTrainedModel, architecture: Architecture) -> Callable[[SlicePlan], int]:
    """Return a function that counts the decoder blocks' stored parameters after slicing the dense ``model`` by a plan.

    With r_s readers' rows and w_s writers' columns (one more for a bias) at site s, the blocks store
    ``fixed + sum_s r_s d_s + w_s d_{s+1} + [shortcut] d_s d_{s+1}``.
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
            width, following = plan.widths[site], plan.widths[site + 1]
            total += reading * width + writing * following + plan.has_shortcut(site) * width * following
        return total

    return count


def check_plan(plan: SlicePlan, model: PreTrainedModel) -> None:
    """Raise InputError unless ``plan`` is one for a model of this depth and hidden size."""
    sites = sum(1 for _ in architecture_of(model).sites(model)) + 1
    full = model.config.hidden_size
    fits = (
        plan.full_width == full
        and len(plan.widths) == len(plan.groups) == sites
        and all(isinstance(width, int) and 0 < width <= full for width in plan.widths)
        and all(isinstance(group, int) for group in plan.groups)
    )
    if not fits:
        raise InputError(
            f"the plan (quantization_config of a sliced model) does not fit a model of {sites} norm sites and hidden "
            f"size {full}: it was made for another one or was edited."
        )


def _check_sliceable(model: PreTrainedModel, architecture: Architecture) -> None:
    block = getattr(model.config, "quantization_config", None)
    method = getattr(block, "quant_method", block.get("quant_method") if isinstance(block, dict) else None)
    if method == "slicegpt":
        raise InputError("the model is sliced already: slice the dense model it was made from.")
    if method is not None:
        raise InputError(f"the model is quantised ({method}): slice the unquantised model, then quantise the result.")
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise InputError(
                f"{name} is on the meta device: load the model with its weights in memory, without offloading."
            )
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
