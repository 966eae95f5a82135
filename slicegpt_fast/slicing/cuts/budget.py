"""Spend one budget of stored parameters on cuts: statistics, curves, sizes, and the few best plans against each other.

one forward and backward pass --> curves of all layers --> sizes for each width of the stream --> the cut model
                                                                                                    |
                                                                    writers corrected for the errors before them
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
from slicegpt_fast.slicing.batches import Batch, checked
from slicegpt_fast.slicing.cuts.choice import Sizes, choose_sizes
from slicegpt_fast.slicing.cuts.correction import correct_
from slicegpt_fast.slicing.cuts.curve import Curve
from slicegpt_fast.slicing.cuts.cutting import LayerCuts, cut_model, fit_cuts
from slicegpt_fast.slicing.cuts.sensitivity import SiteStatistics, layers_within, measure_sensitivity, summed_loss
from slicegpt_fast.slicing.cuts.stream import shared_basis, stream_curve
from slicegpt_fast.slicing.format import SliceConfig
from slicegpt_fast.slicing.integration import mark_sliced
from slicegpt_fast.slicing.memory import free_memory
from slicegpt_fast.slicing.options import SliceOptions
from slicegpt_fast.slicing.plan import SlicePlan, check_sliceable
from slicegpt_fast.slicing.rotation import apply_bases
from slicegpt_fast.slicing.selfcheck import check_layers

WIDTHS = 8  # of the stream that are tried below the full one, in steps of D / 32
CONTENDERS = 3  # plans that are tried on held-out text, of those that may win
MARGIN = 1.5  # a plan may win whose predicted loss is at most this much of the lowest: predictions are that good
FREE_SHARE = 0.5  # of free memory that the sums of a group of layers may fill, beside what is made of them
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
    model: PreTrainedModel,
    calibration: Iterable[Batch],
    options: SliceOptions,
    *,
    check: bool = True,
    progress: bool = True,
) -> CutResult:
    """Return a copy of a dense model that stores what ``options`` ask for, cut wherever it costs least.

    Args:
        model: a dense causal language model; unchanged on return.
        calibration: token batches, as for :func:`slicegpt_fast.slice_model`.
        options: give ``target_params`` and what may be cut.
        check: compare every decoder layer, rotated but not cut, with the dense one on a few calibration tokens first.
        progress: show progress bars.

    Raises:
        InputError: the model cannot be sliced, the text is malformed or too short, or no sizes meet the budget.
    """
    decoder = Decoder(model)
    check_sliceable(decoder)
    options = _within_row(options, decoder)
    batches = [*checked(calibration, model.config, torch.device("cpu"))]
    if check:
        check_layers(model, batches)
    cuts, found = _fit(decoder, batches, options, progress)
    trials = [Trial(sizes) for sizes in found]
    contenders = [sizes for sizes in found if sizes.loss <= MARGIN * found[0].loss][:CONTENDERS]
    if len(contenders) > 1 and len(batches) >= HELD_OUT:
        trials = _compare(decoder, batches, options, [sizes.width for sizes in contenders], trials, progress)
    sizes = trials[0].sizes
    made, bases = cut_to_sizes(decoder, batches, cuts, sizes, progress=progress)
    return CutResult(made, sizes.plan(decoder), tuple(trials), bases)


def cut_to_sizes(
    decoder: Decoder,
    batches: Sequence[dict[str, Tensor]],
    cuts: Sequence[LayerCuts],
    sizes: Sizes,
    *,
    progress: bool = True,
) -> tuple[PreTrainedModel, Bases | None]:
    """Return a copy of a dense model that keeps ``sizes``, and the basis that its stream was sliced by, if it was.

    Args:
        decoder: the dense model.
        batches: the calibration text, of ``input_ids`` and ``attention_mask``, by which the stream is sliced.
        cuts: what its layers' cuts were fitted to.
        sizes: what to keep.
        progress: show progress bars.
    """
    cut = cut_model(decoder.model, cuts, sizes.channels, sizes.values)
    plan, bases = sizes.plan(decoder), None
    if plan.cuts_layers:
        correct_(cut, decoder.model, batches, progress=progress)
    if plan.basis is not None:
        beside = replace(plan, channels=(), values=())  # what is cut already
        bases = refit_readers(cut, batches, find_bases(cut, batches, beside, progress=progress), progress=progress)
        cut = apply_bases(cut, bases, progress=progress)
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    mark_sliced(cut, decoder.model, SliceConfig(tokens, **vars(plan)))
    return cut, bases


def _within_row(options: SliceOptions, decoder: Decoder) -> SliceOptions:
    """The options with the axes that the family takes; InputError where they name one that it refuses."""
    refused = dict(decoder.architecture.refused)
    for axis in options.axes if options.cut not in (None, "auto") else ():
        if axis in refused:
            family = decoder.model.config.model_type
            raise InputError(f"{family} models cannot be cut along {axis!r}: {refused[axis]}. Leave it out of cut.")
    return replace(options, cut=tuple(axis for axis in options.axes if axis not in refused))


def _fit(
    decoder: Decoder, batches: Sequence[dict[str, Tensor]], options: SliceOptions, progress: bool
) -> tuple[list[LayerCuts], list[Sizes]]:
    """The cuts that statistics of some calibration batches give, and the sizes within the budget, the best first."""
    model, axes = decoder.model, options.axes
    channels = options.cut_step("channels", model.device) if "channels" in axes else None
    values = options.cut_step("values", model.device) if "values" in axes else None
    cuts: list[LayerCuts] = []
    sites: list[SiteStatistics] = []
    while len(cuts) < len(decoder.layers):
        layers = layers_within(decoder, len(cuts), FREE_SHARE * free_memory(model.device))
        found = measure_sensitivity(model, batches, layers=layers, axes=axes, progress=progress)
        cuts += fit_cuts(decoder, found, channels=channels, values=values, layers=layers, progress=progress)
        sites += found.sites.values()
    stream = _stream(decoder, sites, options)
    assert options.target_params is not None
    sizes = choose_sizes(decoder, cuts, stream, options.target_params, budget=options.budget, uniform=options.uniform)
    return cuts, sizes


def _stream(decoder: Decoder, sites: Sequence[SiteStatistics], options: SliceOptions) -> Curve:
    """The curve of the stream, or the full width alone."""
    full = decoder.width
    if "stream" not in options.axes:
        return Curve((full,), (0.0,))
    step = options.cut_step("stream", decoder.model.device)
    widths = [full - math.ceil(full * number / 32 / step) * step for number in range(1, WIDTHS + 1)]
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
    fitted, rest = batches[:-held_out], batches[-held_out:]
    cuts, found = _fit(decoder, fitted, options, progress)
    dense = mean_loss(decoder.model, rest)
    added = {
        sizes.width: mean_loss(cut_to_sizes(decoder, fitted, cuts, sizes, progress=progress)[0], rest) - dense
        for sizes in found
        if sizes.width in widths
    }
    tried = [replace(trial, added=added.get(trial.sizes.width)) for trial in trials]
    return sorted(tried, key=lambda trial: math.inf if trial.added is None else trial.added)


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
