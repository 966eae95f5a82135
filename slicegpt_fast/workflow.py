"""From the name of a model to a sliced one in a folder: the steps that ``slice`` and ``quickstart`` share."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Group
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slicegpt_fast.architectures import Decoder
from slicegpt_fast.calibration import batched
from slicegpt_fast.checkpoint import load_model, load_tokenizer, save_model
from slicegpt_fast.evaluation import perplexity
from slicegpt_fast.plots import plot_recovery, plot_sizes, plot_spectra
from slicegpt_fast.quantization import Precision
from slicegpt_fast.recovery import Recovery
from slicegpt_fast.slicing import (
    CutResult,
    SliceOptions,
    SlicePlan,
    apply_bases,
    cut_to_budget,
    dense_sizes,
    fit_bases,
    quantize_model,
    slice_config_of,
)
from slicegpt_fast.tables import Measure, comparison, cut_table, figures, plan_title, size_measures, size_notes


@dataclass(frozen=True)
class Sliced:
    """What became of a dense model, and what there is to show of it.

    Attributes:
        model: the sliced model.
        plan: by which.
        files: what is saved beside it: the name of each file, and what writes it.
        tried: the plans that were compared, if any were.
    """

    model: PreTrainedModel
    plan: SlicePlan
    files: Mapping[str, Callable[[Path], object]]
    tried: Table | None = None


def load(
    source: str | Path, *, device: str, dtype: torch.dtype | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a model on its device, and its tokenizer; arguments as of :func:`slicegpt_fast.load_model`."""
    tokenizer = load_tokenizer(source)
    model: Any = load_model(source, dtype=dtype)  # Any: transformers decorates ``to``
    return model.to(device), tokenizer


def slice_windows(dense: PreTrainedModel, calibration: Tensor, options: SliceOptions, *, progress: bool) -> Sliced:
    """Return what slicing makes of ``dense`` by windows of tokens [n, length]."""
    if options.axes:
        result = cut_to_budget(dense, batched(calibration), options, progress=progress)
        return Sliced(result.model, result.plan, _files_of_cut(dense, result), cut_table(result))
    bases = fit_bases(dense, batched(calibration), options, progress=progress)
    sliced = apply_bases(dense, bases, progress=progress)
    return Sliced(sliced, bases.plan, {"spectra.png": partial(plot_spectra, bases)})


def quantize_windows(
    model: PreTrainedModel, calibration: Tensor | None, precision: Precision, *, progress: bool
) -> PreTrainedModel:
    """Return what rounding to ``precision`` makes of a model by windows of tokens [n, length], if there are any."""
    asked = asdict(precision)
    batches = None if calibration is None else batched(calibration)
    return quantize_model(model, asked.pop("bits"), **asked, calibration=batches, progress=progress)


def _files_of_cut(dense: PreTrainedModel, result: CutResult) -> dict[str, Callable[[Path], object]]:
    """The sizes of the layers where these are cut, the spectrum of the stream where it is, and all that was tried."""
    files: dict[str, Callable[[Path], object]] = {}
    if result.plan.cuts_layers:
        files["sizes.png"] = partial(plot_sizes, result.plan, dense_sizes(Decoder(dense)))
    if result.bases is not None:
        files["spectra.png"] = partial(plot_spectra, result.bases)
    trials = json.dumps([asdict(trial) for trial in result.trials], indent=1)
    return {**files, "plan.json": lambda path: path.write_text(trials)}


def save_recovered(recovery: Recovery, tokenizer: PreTrainedTokenizerBase, folder: Path, text: str) -> str:
    """Save a recovered model with the curve of its training; return the line that says so.

    Args:
        recovery: the model, and what was measured.
        tokenizer: saved beside it.
        folder: does not exist yet, or is empty.
        text: for the card: what the model learnt from.
    """
    best = Measure("perplexity", recovery.teacher, recovery.best.perplexity, "{:.2f}".format)

    def curve(path: Path) -> None:
        plot_recovery(recovery, path / "recovery.png")

    save_model(recovery.model, folder, tokenizer, also=curve, figures=figures([best]), text=text)
    return f"Saved to {folder}, with its curve in {folder / 'recovery.png'}."


def measure(dense: PreTrainedModel, sliced: Sliced, held_out: Mapping[str, Tensor], *, progress: bool) -> list[Measure]:
    """Return the sizes of both models, and their perplexity on each text.

    Args:
        dense: the model.
        sliced: what it became.
        held_out: windows of tokens [n, length] of each text, by what the table calls perplexity on it; n may be 0.
        progress: show progress bars.
    """
    measures = size_measures(dense, sliced.model)
    for label, windows in held_out.items():
        if len(windows):
            before, after = (perplexity(each, batched(windows), progress=progress) for each in (dense, sliced.model))
            measures.append(Measure(label, before, after, "{:.2f}".format))
    return measures


def compare(name: str, dense: PreTrainedModel, sliced: Sliced, measures: Sequence[Measure], note: str) -> Group:
    """Return the table of what was measured, with ``note`` on the perplexity below it."""
    notes = [*size_notes(dense, sliced.model), note]
    slice_config = slice_config_of(sliced.model)
    precision = slice_config and slice_config.rounding()
    title = ", ".join([plan_title(name, dense, sliced.plan), *([str(precision)] if precision else [])])
    names = ("dense", "sliced") if slice_config_of(dense) is None and sliced.plan.cuts else ("before", "quantised")
    return comparison(title, measures, notes, names=names)


def save(
    sliced: Sliced, tokenizer: PreTrainedTokenizerBase, folder: Path, measures: Sequence[Measure], text: str
) -> str:
    """Save a sliced model with its files and a card of what was measured; return the line that says so.

    Args:
        sliced: the model and its files.
        tokenizer: saved beside it.
        folder: does not exist yet, or is empty.
        measures: for the card.
        text: for the card: what the model was calibrated on.
    """

    def write(path: Path) -> None:
        for name, write_file in sliced.files.items():
            write_file(path / name)

    save_model(sliced.model, folder, tokenizer, also=write, figures=figures(measures), text=text)
    listed = " and ".join(f"its {Path(name).stem} in {folder / name}" for name in sliced.files)
    return f"Saved to {folder}, with {listed}." if listed else f"Saved to {folder}."
