"""What a slice did and how fast it runs, as figures: PNG files drawn with matplotlib."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from slicegpt_fast.architectures import Axis
from slicegpt_fast.benchmark import Speeds
from slicegpt_fast.recovery import Recovery
from slicegpt_fast.slicing import Bases, SlicePlan
from slicegpt_fast.slicing.summary import kept_directions

FLOOR = 1e-12  # a share of the variance below this is rounding


def plot_speeds(title: str, speeds: Speeds, path: Path) -> None:
    """Draw prefill and decode speed as a PNG: a bar per model under each harness, its floor as a line above it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained", dpi=150)
    models = list(speeds.stored_parameters)
    harnesses = list(dict.fromkeys(row.harness for row in speeds.rows))
    width = 0.8 / len(models)
    for axes, phase in zip(figure.subplots(1, 2), ("prefill", "decode"), strict=True):
        for number, name in enumerate(models):
            rows = [row for row in speeds.rows if row.model == name]
            positions = np.arange(len(harnesses)) + width * (number - (len(models) - 1) / 2)
            values = np.array([getattr(row, phase) for row in rows])
            limits = values / np.array([getattr(row, f"{phase}_share") for row in rows])
            bars = axes.bar(positions, values, 0.9 * width, label=name)
            axes.bar_label(bars, fmt="{:.0f}", fontsize=8)
            label = "floor of the hardware" if number == len(models) - 1 else None
            axes.hlines(limits, positions - 0.45 * width, positions + 0.45 * width, color="black", lw=1.5, label=label)
        axes.set_xticks(range(len(harnesses)), harnesses)
        axes.set_title(phase)
        axes.set_ylabel("tokens per second")
        axes.grid(alpha=0.3, lw=0.5, axis="y")
        axes.set_axisbelow(True)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=len(models) + 1)
    figure.suptitle(title)
    figure.savefig(path)


def plot_recovery(recovery: Recovery, path: Path) -> None:
    """Draw a training run as a PNG: held-out perplexity between the cut model's and the teacher's, and the loss."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained", dpi=150)
    axes = figure.subplots()
    steps = [point.step for point in recovery.points]
    axes.plot(steps, [point.perplexity for point in recovery.points], marker="o", ms=3, label="held-out perplexity")
    axes.plot(recovery.best.step, recovery.best.perplexity, "s", color="C0", label="kept")
    axes.axhline(recovery.teacher, color="black", lw=1, ls="--", label="of the dense model")
    axes.set_xlabel("steps")
    axes.set_ylabel("perplexity")
    axes.grid(alpha=0.3, lw=0.5)
    loss = axes.twinx()
    loss.plot(steps, [point.loss for point in recovery.points], color="C1", lw=1, label="divergence while training")
    loss.set_ylabel("nats per token")
    figure.legend(loc="outside lower center", ncols=4)
    figure.savefig(path)


def plot_spectra(bases: Bases, path: Path) -> None:
    """Draw the spectra that were cut as a PNG: the variance of each direction, and what the leading ones explain.

    Args:
        bases: from ``find_bases``; their spectra are drawn, the cut at the plan's width is marked.
        path: the file to write.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator

    figure = Figure(figsize=(12, 5), layout="constrained", dpi=150)
    variance, explained = figure.subplots(1, 2)
    number = len(bases.spectra)
    depth = ScalarMappable(Normalize(0, max(number - 1, 1)), "viridis")
    colours = depth.to_rgba(np.arange(number))

    plan, full = bases.plan, bases.plan.full_width
    low, high = min(plan.widths[:-1]), max(plan.widths[:-1])
    for spectrum, colour in zip(bases.spectra, colours, strict=True):
        style = dict(color=colour, lw=0.8)
        share = spectrum.double().cpu() / spectrum.double().sum().item()
        variance.semilogy(range(1, full + 1), share.clamp(min=FLOOR), **style)
        explained.semilogy(range(1, full), (1 - share.cumsum(0))[:-1].clamp(min=FLOOR), **style)  # the last leaves 0
    for axes in (variance, explained):
        axes.axvspan(low, full, color="crimson", alpha=0.08, lw=0)
        axes.axvline(low, color="crimson", lw=1.5, ls="--", label=f"cut: {kept_directions(plan)} directions kept")
        axes.axvline(high, color="crimson", lw=1.5, ls="--")
        axes.set_xlim(1, full)
        axes.set_xlabel("direction, by falling variance")
        axes.grid(alpha=0.3, lw=0.5)
    variance.set_ylabel("share of the site's variance")
    variance.legend(loc="upper right")
    explained.set_ylabel("variance explained by the leading directions")
    explained.invert_yaxis()  # drawn as what is left over, so that the nines are far apart
    explained.yaxis.set_major_locator(LogLocator())
    explained.yaxis.set_major_formatter(FuncFormatter(lambda left, _: f"{100 * (1 - left):.8g} %"))
    if number > 1:
        figure.colorbar(depth, ax=explained, label="norm sites, from the embedding to the head")
    figure.suptitle(f"Covariance of the residual stream at the norms ({plan.basis} basis, {plan.signal} signal)")
    figure.savefig(path)


def plot_sizes(plan: SlicePlan, full: Mapping[Axis, Sequence[int]], path: Path) -> None:
    """Draw what a cut kept in every decoder layer as a PNG: a bar per layer, the dense model's size as a line above.

    Args:
        plan: of the cut.
        full: the dense model's sizes, from ``dense_sizes``.
        path: the file to write.
    """
    from matplotlib.figure import Figure

    shown = {axis: plan.sizes(axis) for axis in full if plan.sizes(axis)}
    figure = Figure(figsize=(12, 5), layout="constrained", dpi=150)
    labels = {"channels": "channels of the MLP", "values": "rank of the attention's values"}
    for axes, (axis, sizes) in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown.items(), strict=True):
        layers = np.arange(len(sizes))
        axes.bar(layers, sizes, 0.8, label="kept")
        axes.hlines(full[axis], layers - 0.5, layers + 0.5, color="black", lw=1.5, label="dense")
        axes.set_xlabel("decoder layer")
        axes.set_ylabel(labels[axis])
        axes.grid(alpha=0.3, lw=0.5, axis="y")
        axes.set_axisbelow(True)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.suptitle(f"Sizes of the decoder layers; {kept_directions(plan)} directions of the residual stream")
    figure.savefig(path)


def plot_trade_off(plans: Mapping[str, Iterable[tuple[float, float]]], dense: float, path: Path) -> None:
    """Draw perplexity against stored parameters as a PNG, a line per basis plan.

    Args:
        plans: name -> (stored parameters of the decoder blocks as a share of the dense ones, perplexity).
        dense: perplexity of the dense model.
        path: the file to write.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained", dpi=150)
    axes = figure.subplots()
    for name, points in plans.items():
        stored, perplexities = zip(*sorted(points), strict=True) if points else ((), ())
        axes.semilogy(stored, perplexities, marker="o", lw=1.5, ms=4, label=name)
    axes.axhline(dense, color="black", ls="--", lw=1, label=f"dense ({dense:.2f})")
    axes.set_xlabel("stored parameters of the decoder blocks, as a share of the dense model's")
    axes.set_ylabel("perplexity on held-out text")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.grid(alpha=0.3, lw=0.5, which="both")
    axes.legend()
    figure.savefig(path)
