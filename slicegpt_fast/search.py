"""Choose a basis plan by trying them: each within the same budget, the best by perplexity on held-out text."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from slicegpt_fast.architectures import architecture_of
from slicegpt_fast.errors import InputError
from slicegpt_fast.evaluation import perplexity
from slicegpt_fast.slicing import apply_bases, block_parameters, fit_bases

RANK_SHARE = 16  # truncated shortcuts keep a rank of D / 16

PLANS: dict[str, dict[str, Any]] = {
    "per-norm, dense shortcuts": {"basis": "per-norm", "signal": "raw"},
    "per-norm, aligned shortcuts": {"basis": "per-norm", "signal": "raw", "shortcut": "aligned"},
    "per-norm, aligned, rank D/16": {"basis": "per-norm", "signal": "raw", "shortcut": "aligned", "rank": True},
    "4 groups, aligned shortcuts": {"basis": 4, "signal": "normalized", "shortcut": "aligned"},
    "shared": {"basis": "shared", "signal": "normalized"},
    "shared, re-fitted": {"basis": "shared", "signal": "normalized", "refit": True},
}


@dataclass(frozen=True)
class Trial:
    """A plan that was tried.

    Attributes:
        name: the plan's name in :data:`PLANS`.
        arguments: what :func:`slicegpt_fast.slice_model` is given for it.
        width: the kept size of the first site.
        stored: the decoder blocks' stored parameters as a share of the dense ones.
        perplexity: on the held-out batches.
    """

    name: str
    arguments: dict[str, Any]
    width: int
    stored: float
    perplexity: float


def plan_arguments(name: str, model: PreTrainedModel, target_params: float) -> dict[str, Any]:
    """The arguments of :func:`slicegpt_fast.slice_model` for a plan of :data:`PLANS` within a budget."""
    arguments = PLANS[name] | {"target_params": target_params, "slice_head": architecture_of(model.config).keeps_width}
    if arguments.pop("rank", False):
        arguments["shortcut_rank"] = model.config.hidden_size // RANK_SHARE
    return arguments


def try_plans(
    model: PreTrainedModel,
    calibration: Sequence[Tensor],
    held_out: Sequence[Tensor],
    target_params: float,
    *,
    round_to: int | Literal["auto"] = 8,
    progress: bool = True,
) -> list[Trial]:
    """Slice the dense ``model`` by every plan that meets a budget and measure it; the best first.

    Args:
        model: the dense model.
        calibration: token batches the bases are fitted to.
        held_out: other token batches, for the perplexity.
        target_params: the decoder blocks' stored parameters, as a share of the dense ones.
        round_to: as in :func:`slicegpt_fast.slice_model`.
        progress: show a progress bar over the plans.

    Raises:
        InputError: no plan meets the budget.
    """
    trials, refusal = [], None
    for name in tqdm(PLANS, desc="trying plans", unit="plan", disable=not progress):
        arguments = plan_arguments(name, model, target_params) | {"round_to": round_to}
        try:
            trials.append(_try(name, arguments, model, calibration, held_out))
        except InputError as error:
            refusal = error
    if refusal is not None and not trials:
        raise refusal
    return sorted(trials, key=lambda trial: (math.isnan(trial.perplexity), trial.perplexity))


def _try(
    name: str,
    arguments: dict[str, Any],
    model: PreTrainedModel,
    calibration: Sequence[Tensor],
    held_out: Sequence[Tensor],
) -> Trial:
    """Slice and measure; nothing of the sliced model outlives the call."""
    bases = fit_bases(model, calibration, progress=False, **arguments)
    sliced = apply_bases(model, bases, progress=False)
    stored = block_parameters(sliced) / block_parameters(model)
    return Trial(name, arguments, bases.plan.widths[0], stored, perplexity(sliced, held_out))
