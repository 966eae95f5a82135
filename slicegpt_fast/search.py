"""Choose a basis plan by trying them: each within the same budget, the best by perplexity on held-out text."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from slicegpt_fast.architectures import architecture_of
from slicegpt_fast.errors import InputError
from slicegpt_fast.evaluation import perplexity
from slicegpt_fast.slicing import SliceOptions, apply_bases, block_parameters, fit_bases
from slicegpt_fast.slicing.options import RoundTo


@dataclass(frozen=True)
class Trial:
    """A plan that was tried.

    Attributes:
        name: the plan's name in :func:`plans`.
        options: what was tried.
        width: the kept size of the first site.
        stored: the decoder blocks' stored parameters as a share of the dense ones.
        perplexity: on the held-out batches.
    """

    name: str
    options: SliceOptions
    width: int
    stored: float
    perplexity: float


def plans(model: PreTrainedModel, target_params: float, round_to: RoundTo | None = None) -> dict[str, SliceOptions]:
    """Return the plans worth trying on ``model`` within a budget, by name."""
    keeps_width = architecture_of(model.config).keeps_width
    dense = SliceOptions(target_params=target_params, basis="per-norm", round_to=round_to, slice_head=keeps_width)
    aligned = replace(dense, shortcut="aligned")
    shared = replace(dense, basis="shared", signal="normalized")
    return {
        "per-norm, dense shortcuts": dense,
        "per-norm, aligned shortcuts": aligned,
        "per-norm, aligned, rank D/16": replace(aligned, shortcut_rank=model.config.hidden_size // 16),
        "4 groups, aligned shortcuts": replace(aligned, basis=4, signal="normalized"),
        "shared": shared,
        "shared, re-fitted": replace(shared, refit=True),
    }


def try_plans(
    model: PreTrainedModel,
    calibration: Sequence[Tensor],
    held_out: Sequence[Tensor],
    target_params: float,
    *,
    round_to: RoundTo | None = None,
    progress: bool = True,
) -> list[Trial]:
    """Slice the dense ``model`` by every plan that meets a budget and measure it; the best first.

    Args:
        model: the dense model.
        calibration: token batches the bases are fitted to.
        held_out: other token batches, for the perplexity.
        target_params: the decoder blocks' stored parameters, as a share of the dense ones.
        round_to: as in :class:`slicegpt_fast.SliceOptions`.
        progress: show a progress bar over the plans.

    Raises:
        InputError: no plan meets the budget.
    """
    trials, refusal = [], None
    tried = plans(model, target_params, round_to)
    for name, options in tqdm(tried.items(), desc="trying plans", unit="plan", disable=not progress):
        try:
            trials.append(_try(name, options, model, calibration, held_out))
        except InputError as error:
            refusal = error
    if refusal is not None and not trials:
        raise refusal
    return sorted(trials, key=lambda trial: (math.isnan(trial.perplexity), trial.perplexity))


def _try(
    name: str,
    options: SliceOptions,
    model: PreTrainedModel,
    calibration: Sequence[Tensor],
    held_out: Sequence[Tensor],
) -> Trial:
    """Slice and measure; nothing of the sliced model outlives the call."""
    bases = fit_bases(model, calibration, options, progress=False)
    sliced = apply_bases(model, bases, progress=False)
    stored = block_parameters(sliced) / block_parameters(model)
    return Trial(name, options, bases.plan.widths[0], stored, perplexity(sliced, held_out))
