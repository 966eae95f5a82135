"""From the name of a model to a sliced one in a folder: the steps that ``slice`` and ``quickstart`` share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Group
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slicegpt_fast.calibration import batched
from slicegpt_fast.checkpoint import load_model, load_tokenizer, save_model
from slicegpt_fast.evaluation import perplexity
from slicegpt_fast.plots import plot_spectra
from slicegpt_fast.slicing import Bases, SliceOptions, SlicePlan, apply_bases, fit_bases
from slicegpt_fast.tables import Measure, comparison, plan_title, size_measures, size_notes


def load(
    source: str | Path, *, device: str, dtype: torch.dtype | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a model on its device, and its tokenizer; arguments as of :func:`slicegpt_fast.load_model`."""
    tokenizer = load_tokenizer(source)
    model: Any = load_model(source, dtype=dtype)  # Any: transformers decorates ``to``
    return model.to(device), tokenizer


def slice_windows(
    dense: PreTrainedModel, calibration: Tensor, options: SliceOptions, *, progress: bool
) -> tuple[Bases, PreTrainedModel]:
    """Return the bases fitted to windows of tokens [n, length], and the sliced model."""
    bases = fit_bases(dense, batched(calibration), options, progress=progress)
    return bases, apply_bases(dense, bases, progress=progress)


def compare(
    name: str,
    dense: PreTrainedModel,
    sliced: PreTrainedModel,
    plan: SlicePlan,
    held_out: Tensor,
    *,
    note: str,
    progress: bool,
) -> Group:
    """Measure the size of both models, and their perplexity if there are windows for it; return the table.

    Args:
        name: the model's, for the title.
        dense: the model.
        sliced: what it became.
        plan: by which.
        held_out: windows of tokens [n, length]; n may be 0.
        note: what is said of the perplexity, below the table.
        progress: show progress bars.
    """
    measures = size_measures(dense, sliced)
    if len(held_out):
        before, after = (perplexity(each, batched(held_out), progress=progress) for each in (dense, sliced))
        measures.append(Measure("perplexity", before, after, "{:.2f}".format))
    return comparison(plan_title(name, plan), measures, [*size_notes(dense), note])


def save(
    sliced: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    bases: Bases,
    folder: Path,
    *,
    sites: Tensor | None = None,
    also: Callable[[Path], None] = lambda folder: None,
) -> str:
    """Save a sliced model with a plot of its spectra; return the line that says so.

    Args:
        sliced: the model.
        tokenizer: saved beside it.
        bases: what it was sliced with.
        folder: does not exist yet, or is empty.
        sites: as for :func:`slicegpt_fast.plots.plot_spectra`.
        also: writes what else belongs into the folder.
    """

    def plot(path: Path) -> None:
        plot_spectra(bases, path / "spectra.png", sites=sites)
        also(path)

    save_model(sliced, folder, tokenizer, also=plot)
    return f"Saved to {folder}, with its spectra in {folder / 'spectra.png'}."
