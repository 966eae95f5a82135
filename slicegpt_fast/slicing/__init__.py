"""Slicing: choose a plan, find its bases on calibration text, rotate and cut the weights."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Unpack

from transformers import PreTrainedModel

from slicegpt_fast.slicing.bases import Bases, align, find_bases, refit_readers
from slicegpt_fast.slicing.batches import Batch, batch_list
from slicegpt_fast.slicing.cuts.budget import CutResult, cut_to_budget
from slicegpt_fast.slicing.format import SliceConfig, slice_config_of
from slicegpt_fast.slicing.options import SliceArguments, SliceOptions
from slicegpt_fast.slicing.plan import SlicePlan, block_parameters, dense_sizes, fit_widths, make_plan
from slicegpt_fast.slicing.quantizing import dequantize_model, quantize_model
from slicegpt_fast.slicing.rotation import apply_bases
from slicegpt_fast.slicing.selfcheck import check_layers
from slicegpt_fast.slicing.storage import IN_MEMORY, Storage

__all__ = [
    "Bases",
    "CutResult",
    "SliceArguments",
    "SliceConfig",
    "SliceOptions",
    "SlicePlan",
    "align",
    "apply_bases",
    "block_parameters",
    "cut_to_budget",
    "dense_sizes",
    "dequantize_model",
    "find_bases",
    "first_plan",
    "fit_bases",
    "make_plan",
    "quantize_model",
    "slice_config_of",
    "slice_model",
]


def slice_model(
    model: PreTrainedModel,
    calibration: Iterable[Batch],
    *,
    check: bool = True,
    progress: bool = True,
    **options: Unpack[SliceArguments],
) -> PreTrainedModel:
    """Return a smaller copy of a causal language model.

    ``target_params`` alone deletes rows and columns wherever it costs least. ``sparsity``, ``widths`` or a ``basis``
    slice the residual stream to its principal components, as published (arXiv 2401.15024).

    The result is a model of the same class: it generates, trains and saves as before, and
    ``AutoModelForCausalLM.from_pretrained`` loads it once ``slicegpt_fast`` is imported. The given model is unchanged.

    Args:
        model: a dense transformers causal language model in fp32, bf16 or fp16.
        calibration: token batches, as :func:`slicegpt_fast.token_batches` makes them: [B, T] integers, or mappings with
            ``input_ids`` and ``attention_mask``.
        check: compare every decoder layer, rotated but not cut, with the dense one on a few calibration tokens first.
        progress: show progress bars.
        options: the fields of :class:`slicegpt_fast.SliceOptions`, by name: one of ``sparsity``, ``target_params`` and
            ``widths``; with the second ``cut``, ``budget``, ``uniform``; and ``basis``,
            ``signal``, ``shortcut``, ``shortcut_rank``, ``schedule``, ``refit``,
            ``round_to``, ``slice_head``.

    Raises:
        InputError: with one sentence on what to change.
    """
    chosen = SliceOptions(**options)
    if chosen.axes:
        return cut_to_budget(model, calibration, chosen, check=check, progress=progress).model
    bases = fit_bases(model, calibration, chosen, check=check, progress=progress)
    return apply_bases(model, bases, progress=progress)


def fit_bases(
    model: PreTrainedModel,
    calibration: Iterable[Batch],
    options: SliceOptions,
    *,
    check: bool = True,
    storage: Storage = IN_MEMORY,
    progress: bool = True,
) -> Bases:
    """Return the bases that :func:`slice_model` applies: all of its work but the slicing itself."""
    calibration = batch_list(calibration)
    plan = first_plan(model, options)
    if check and storage is IN_MEMORY:  # weights from files stand in modules that nobody touched
        check_layers(model, calibration)
    if options.schedule == "variance":
        spectra = find_bases(model, calibration, plan, storage=storage.of("spectra"), progress=progress).spectra
        plan = fit_widths(model, plan, spectra, options)
    bases = find_bases(model, calibration, plan, storage=storage.of("bases"), progress=progress)
    if options.refit:
        bases = refit_readers(model, calibration, bases, storage=storage.of("refit"), progress=progress)
    return align(bases, storage=storage.of("align")) if plan.shortcut == "aligned" else bases


def first_plan(model: PreTrainedModel, options: SliceOptions) -> SlicePlan:
    """Return the plan that ``options`` ask for, of full width where spectra will give the sizes."""
    if options.schedule == "variance":
        options = replace(options, schedule="uniform", target_params=None, sparsity=0)
    return make_plan(model, options)
