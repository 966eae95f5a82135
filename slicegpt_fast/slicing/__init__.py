"""Slicing: choose a plan, find its bases on calibration text, rotate and cut the weights."""

from collections.abc import Iterable

from transformers import PreTrainedModel

from slicegpt_fast.slicing.bases import Bases, Batch, find_bases
from slicegpt_fast.slicing.format import SliceConfig, slice_config_of
from slicegpt_fast.slicing.plan import Basis, Signal, SlicePlan, block_parameters, make_plan
from slicegpt_fast.slicing.rotation import apply_bases

__all__ = [
    "Bases",
    "SliceConfig",
    "SlicePlan",
    "apply_bases",
    "block_parameters",
    "find_bases",
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
    basis: Basis = "per-norm",
    signal: Signal = "raw",
    round_to: int = 8,
    slice_head: bool = False,
    progress: bool = True,
) -> PreTrainedModel:
    """Return a smaller copy of a causal language model, sliced to its principal components (arXiv 2401.15024).

    The result is a model of the same class: it generates, trains and saves as before, and
    ``AutoModelForCausalLM.from_pretrained`` loads it once ``slicegpt_fast`` is imported. The given model is unchanged.

    Args:
        model: a dense transformers causal language model in fp32, bf16 or fp16.
        calibration: token batches: [B, T] integer tensors, or mappings with ``input_ids`` and ``attention_mask``.
        sparsity: share of the hidden size to delete, in [0, 1). Give this or ``target_params``.
        target_params: stored parameters of the decoder blocks after slicing, shortcuts included, as a share of before.
        basis: ``"per-norm"`` for a basis at every norm with shortcuts between them, as published; ``"shared"`` for one
            basis and no shortcuts (the head is then always sliced too).
        signal: what the bases are fitted to, each norm's input (``"raw"``) or its output (``"normalized"``).
        round_to: the kept size is rounded down to a multiple of this.
        slice_head: slice the last block's output and the head too.
        progress: show progress bars.

    Raises:
        InputError: with one sentence on what to change.
    """
    plan = make_plan(
        model,
        sparsity=sparsity,
        target_params=target_params,
        basis=basis,
        signal=signal,
        round_to=round_to,
        slice_head=slice_head,
    )
    bases = find_bases(model, calibration, plan, progress=progress)
    return apply_bases(model, bases, progress=progress)
