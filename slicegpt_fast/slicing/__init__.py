"""Slicing: choose a plan, find its bases on calibration text, rotate and cut the weights."""

from collections.abc import Iterable, Sequence
from typing import Any, Literal

from transformers import PreTrainedModel

from slicegpt_fast.errors import InputError, check_choice
from slicegpt_fast.slicing.bases import Bases, align, find_bases, refit_readers
from slicegpt_fast.slicing.format import SliceConfig, slice_config_of
from slicegpt_fast.slicing.plan import (
    Basis,
    Schedule,
    Shortcut,
    Signal,
    SlicePlan,
    block_parameters,
    fit_widths,
    make_plan,
)
from slicegpt_fast.slicing.rotation import apply_bases
from slicegpt_fast.slicing.selfcheck import check_layers
from slicegpt_fast.slicing.storage import IN_MEMORY, Storage
from slicegpt_fast.slicing.walk import Batch

__all__ = [
    "Bases",
    "SliceConfig",
    "SlicePlan",
    "align",
    "apply_bases",
    "block_parameters",
    "find_bases",
    "first_plan",
    "fit_bases",
    "make_plan",
    "slice_config_of",
    "slice_model",
]


def slice_model(
    model: PreTrainedModel,
    calibration: Iterable[Batch],
    *,
    sparsity: float | None = None,
    target_params: float | None = None,
    widths: Sequence[int] | None = None,
    basis: Basis = "per-norm",
    signal: Signal = "raw",
    shortcut: Shortcut = "dense",
    shortcut_rank: int | None = None,
    schedule: Schedule = "uniform",
    refit: bool = False,
    round_to: int | Literal["auto"] = 8,
    slice_head: bool = False,
    check: bool = True,
    progress: bool = True,
) -> PreTrainedModel:
    """Return a smaller copy of a causal language model, sliced to its principal components (arXiv 2401.15024).

    The result is a model of the same class: it generates, trains and saves as before, and
    ``AutoModelForCausalLM.from_pretrained`` loads it once ``slicegpt_fast`` is imported. The given model is unchanged.

    Args:
        model: a dense transformers causal language model in fp32, bf16 or fp16.
        calibration: token batches: [B, T] integer tensors, or mappings with ``input_ids`` and ``attention_mask``.
        sparsity: share of the hidden size to delete, in [0, 1). Give one of this, ``target_params`` and ``widths``.
        target_params: stored parameters of the decoder blocks after slicing, shortcuts included, as a share of before.
        widths: the kept size of every norm site, the final norm's last.
        basis: ``"per-norm"`` for a basis at every norm with shortcuts between them, as published; ``"shared"`` for one
            basis and no shortcuts (the head is then always sliced too); a number for that many groups of norms.
        signal: what the bases are fitted to, each norm's input (``"raw"``) or its output (``"normalized"``).
        shortcut: ``"dense"`` matrices, as published, or ``"aligned"``: the same model with shortcuts that are the
            identity minus a matrix of rank D - d at most, stored as two thin factors.
        shortcut_rank: truncate aligned shortcuts to this rank.
        schedule: ``"uniform"`` gives all sites one size; ``"variance"`` gives every basis the same share of its
            variance, within ``target_params``.
        refit: re-fit the readers to the dense model's normalised inputs by least squares, in a second pass over the
            calibration text. SmolLM2's held-out perplexity gains from it, the more the more text (docs/benchmarks).
        round_to: kept sizes are multiples of this; ``"auto"`` picks one for the model's device.
        slice_head: slice the last block's output and the head too.
        check: compare every decoder layer, rotated but not cut, with the dense one on a few calibration tokens first.
        progress: show progress bars.

    Raises:
        InputError: with one sentence on what to change.
    """
    bases = fit_bases(
        model,
        calibration,
        sparsity=sparsity,
        target_params=target_params,
        widths=widths,
        basis=basis,
        signal=signal,
        shortcut=shortcut,
        shortcut_rank=shortcut_rank,
        schedule=schedule,
        refit=refit,
        round_to=round_to,
        slice_head=slice_head,
        check=check,
        progress=progress,
    )
    return apply_bases(model, bases, progress=progress)


def fit_bases(
    model: PreTrainedModel,
    calibration: Iterable[Batch],
    *,
    schedule: Schedule = "uniform",
    refit: bool = False,
    check: bool = True,
    storage: Storage = IN_MEMORY,
    progress: bool = True,
    **plan_arguments: Any,
) -> Bases:
    """All of :func:`slice_model` but the slicing itself: its arguments, and the bases that it applies."""
    calibration = list(calibration)
    plan = first_plan(model, schedule, plan_arguments)
    if check and storage is IN_MEMORY:  # weights from files stand in modules that nobody touched
        check_layers(model, calibration)
    if schedule == "variance":
        spectra = find_bases(model, calibration, plan, storage=storage.of("spectra"), progress=progress).spectra
        step, slice_head = plan_arguments.get("round_to", 8), plan_arguments.get("slice_head", False)
        budget = plan_arguments["target_params"]
        plan = fit_widths(model, plan, spectra, budget, round_to=step, slice_head=slice_head)
    bases = find_bases(model, calibration, plan, storage=storage.of("bases"), progress=progress)
    if refit:
        bases = refit_readers(model, calibration, bases, storage=storage.of("refit"), progress=progress)
    return align(bases, storage=storage.of("align")) if plan.shortcut == "aligned" else bases


def first_plan(model: PreTrainedModel, schedule: Schedule, plan_arguments: dict[str, Any]) -> SlicePlan:
    """The plan that the arguments of :func:`slice_model` ask for, of full width where spectra will give the sizes."""
    check_choice("schedule", schedule, Schedule)
    if schedule == "uniform":
        return make_plan(model, **plan_arguments)
    if plan_arguments.get("target_params") is None:
        raise InputError("schedule='variance' spends a budget: give target_params.")
    return make_plan(model, **plan_arguments | {"target_params": None, "sparsity": 0})
