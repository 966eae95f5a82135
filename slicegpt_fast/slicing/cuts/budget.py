"""Spend one budget of stored parameters on cuts: statistics, curves, sizes, and the few best plans against each other.

one forward and backward pass --> curves of all layers --> sizes for each width of the stream --> the cut model
                                                                                                    | where it pays
                                                                                its stream sliced by one basis
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from slicegpt_fast.architectures import Decoder, evaluating
from slicegpt_fast.errors import InputError
from slicegpt_fast.slicing.bases import Bases, find_bases, refit_readers
from slicegpt_fast.slicing.cuts.choice import Sizes, choose_sizes
from slicegpt_fast.slicing.cuts.curve import Curve
from slicegpt_fast.slicing.cuts.cutting import LayerCuts, cut_model, fit_cuts
from slicegpt_fast.slicing.cuts.sensitivity import Sensitivity, measure_sensitivity, summed_loss
from slicegpt_fast.slicing.cuts.stream import shared_basis, stream_curve
from slicegpt_fast.slicing.format import SliceConfig
from slicegpt_fast.slicing.options import SliceOptions
from slicegpt_fast.slicing.plan import SlicePlan, check_sliceable
from slicegpt_fast.slicing.rotation import apply_bases
from slicegpt_fast.slicing.walk import Batch, checked

WIDTHS = 8  # of the stream that are tried below the full one, in steps of D / 32
CONTENDERS = 3  # plans that are tried on held-out text, of those that may win
MARGIN = 1.5  # a plan may win whose predicted loss is at most this much of the lowest: predictions are that good
HELD_OUT = 4  # of the calibration batches, one in so many compares the contenders


@dataclass(frozen=True)
class Trial:
    """A plan within the budget: its sizes, and the loss per token that it adds on held-out text, where it was tried."""

    sizes: Sizes
    added: float | None = None


@dataclass(frozen=True)
class CutResult:
    """A model cut to a budget.

    Attributes:
        model: the cut model.
        plan: its sizes.
        trials: the plans that met the budget, the one that was taken first.
        bases: what its stream was sliced by; None where the stream was left alone.
    """

    model: PreTrainedModel
    plan: SlicePlan
    trials: tuple[Trial, ...]
    bases: Bases | None


def cut_to_budget(
    model: PreTrainedModel, calibration: Iterable[Batch], options: SliceOptions, *, progress: bool = True
) -> CutResult:
    """Return a copy of a dense model that stores what ``options`` ask for, cut wherever it costs least.

    Raises:
        InputError: the model cannot be sliced, the text is malformed or too short, or no sizes meet the budget.
    """
    decoder = Decoder(model)
    check_sliceable(decoder)
    batches = [*checked(calibration, model.config.vocab_size, torch.device("cpu"))]
    plans = _Plans(decoder, batches, options, progress)
    trials = [Trial(sizes) for sizes in plans.sizes]
    contenders = [sizes for sizes in plans.sizes if sizes.loss <= MARGIN * plans.sizes[0].loss][:CONTENDERS]
    if len(contenders) > 1 and len(batches) >= HELD_OUT:
        trials = _compare(decoder, batches, options, [sizes.width for sizes in contenders], trials, progress)
    sizes = trials[0].sizes
    made, bases = plans.make(sizes)
    plan = _plan(decoder, sizes, bases)
    made.config.quantization_config = SliceConfig(plans.sensitivity.tokens, **vars(plan))
    return CutResult(made, plan, tuple(trials), bases)


class _Plans:
    """The plans that statistics of some calibration batches give."""

    def __init__(
        self, decoder: Decoder, batches: Sequence[dict[str, Tensor]], options: SliceOptions, progress: bool
    ) -> None:
        self.decoder, self.batches, self.progress = decoder, batches, progress
        model = decoder.model
        self.sensitivity = measure_sensitivity(model, batches, progress=progress)
        self.cuts: list[LayerCuts] = fit_cuts(
            decoder,
            self.sensitivity,
            channels=options.cut_step("channels", model.device) if "channels" in options.axes else None,
            values=options.cut_step("values", model.device) if "values" in options.axes else None,
            progress=progress,
        )
        assert options.target_params is not None
        self.sizes = choose_sizes(
            decoder,
            self.cuts,
            _stream(decoder, self.sensitivity, options),
            options.target_params,
            budget=options.budget,
            uniform=options.uniform,
        )

    def make(self, sizes: Sizes) -> tuple[PreTrainedModel, Bases | None]:
        """Return the model of these sizes, and the basis that its stream was sliced by, if it was."""
        cut = cut_model(self.decoder.model, self.cuts, sizes.channels, sizes.values)
        if sizes.width == self.decoder.width:
            return cut, None
        plan = replace(_plan(self.decoder, sizes, None), basis="shared", channels=(), values=())
        bases = find_bases(cut, self.batches, plan, progress=self.progress)
        bases = refit_readers(cut, self.batches, bases, progress=self.progress)
        return apply_bases(cut, bases, progress=self.progress), bases


def _stream(decoder: Decoder, sensitivity: Sensitivity, options: SliceOptions) -> Curve:
    """The curve of the stream, or the full width alone."""
    full = decoder.width
    if "stream" not in options.axes:
        return Curve((full,), (0.0,))
    step = options.cut_step("stream", decoder.model.device)
    widths = [full - math.ceil(full * number / 32 / step) * step for number in range(1, WIDTHS + 1)]
    sites = [*sensitivity.sites.values()]
    return stream_curve(sites, shared_basis(sites), [width for width in widths if width > 0])


def _compare(
    decoder: Decoder,
    batches: Sequence[dict[str, Tensor]],
    options: SliceOptions,
    widths: Sequence[int],
    trials: Sequence[Trial],
    progress: bool,
) -> list[Trial]:
    """Try the plans of these widths of the stream, made of a part of the text, on the rest; the best comes first."""
    held_out = len(batches) // HELD_OUT
    plans = _Plans(decoder, batches[:-held_out], options, progress)
    dense = mean_loss(decoder.model, batches[-held_out:])
    added = {
        sizes.width: mean_loss(plans.make(sizes)[0], batches[-held_out:]) - dense
        for sizes in plans.sizes
        if sizes.width in widths
    }
    tried = [replace(trial, added=added.get(trial.sizes.width)) for trial in trials]
    return sorted(tried, key=lambda trial: math.inf if trial.added is None else trial.added)


def _plan(decoder: Decoder, sizes: Sizes, bases: Bases | None) -> SlicePlan:
    sites = len(decoder.sites)
    basis = None if bases is None else bases.plan.basis
    widths = (sizes.width,) * sites
    return SlicePlan(
        basis, "normalized", decoder.width, widths, (0,) * sites, channels=sizes.channels, values=sizes.values
    )


@torch.inference_mode()
def mean_loss(model: PreTrainedModel, batches: Iterable[dict[str, Tensor]]) -> float:
    """Return the mean loss over all tokens that have a predecessor, in nats."""
    total, number = 0.0, 0
    with evaluating(model):
        for batch in batches:
            inputs = {name: each.to(model.device) for name, each in batch.items()}
            summed, scored = summed_loss(model, inputs, inputs["attention_mask"].bool())
            total, number = total + summed.item(), number + scored
    if not number:
        raise InputError("the held-out part of the calibration text has no token to predict: give longer sequences.")
    return total / number
