"""What a slice did and how fast it runs, as tables for people."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from rich.console import Group
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedModel

from slicegpt_fast.benchmark import Speeds
from slicegpt_fast.evaluation import flops_per_token, stored_bytes, stored_parameters
from slicegpt_fast.recovery import Recovery
from slicegpt_fast.search import Trial
from slicegpt_fast.slicing import CutResult, SlicePlan, block_parameters
from slicegpt_fast.slicing.card import Figure
from slicegpt_fast.slicing.summary import kept_directions, kept_sizes, span
from slicegpt_fast.tasks import Score


class Measure(NamedTuple):
    """A measure of the dense and of the sliced model."""

    label: str
    dense: float
    sliced: float
    format: Callable[[float], str]


def decimal(value: float) -> str:
    """A number with a decimal prefix: 134515008 is "134.5 M"."""
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.1f} {prefix}"
    return f"{value:.1f}"


def size_measures(dense: PreTrainedModel, sliced: PreTrainedModel) -> list[Measure]:
    """What follows from the models alone: stored parameters, bytes, FLOPs per token."""
    return [
        Measure("stored parameters", stored_parameters(dense), stored_parameters(sliced), decimal),
        Measure("  in decoder blocks", block_parameters(dense), block_parameters(sliced), decimal),
        Measure("bytes", stored_bytes(dense), stored_bytes(sliced), lambda size: f"{decimal(size)}B"),
        Measure("matmul FLOPs per token", flops_per_token(dense), flops_per_token(sliced), decimal),
    ]


def figures(measures: Iterable[Measure]) -> list[Figure]:
    """Return the measures as the model card shows them."""
    return [Figure(each.label, each.format(each.dense), each.format(each.sliced)) for each in measures]


def size_notes(dense: PreTrainedModel, sliced: PreTrainedModel) -> list[str]:
    """What has to be said beside :func:`size_measures`."""
    notes = ["FLOPs: 2 for each weight of each matrix, head included; attention scores excluded."]
    if dense.config.tie_word_embeddings and not sliced.config.tie_word_embeddings:
        notes.insert(0, "Stored: the dense model's head is its embedding table; slicing makes two tables of them.")
    return notes


def plan_title(name: str, dense: PreTrainedModel, plan: SlicePlan) -> str:
    """What stands above the results of a slice."""
    if not plan.cuts:
        return name
    if plan.cuts_layers:
        return f"{name}, {kept_sizes(dense, plan)}"
    return f"{name}, {plan.basis} basis, {plan.signal} signal, {kept_directions(plan)} directions kept"


def comparison(
    title: str, measures: Iterable[Measure], notes: Iterable[str], *, names: tuple[str, str] = ("dense", "sliced")
) -> Group:
    """The table dense | sliced | sliced / dense, with notes below it; ``names`` are what the two models are called."""
    table = Table("", title=title, title_justify="left", title_style="bold")
    for name in (*names, " / ".join(names[::-1])):
        table.add_column(name, justify="right")
    for label, dense, sliced, form in measures:
        table.add_row(label, form(dense), form(sliced), f"{sliced / dense:.3f}")
    return Group(table, *(Text(note, style="dim") for note in notes))


def trial_table(trials: Iterable[Trial], caption: str) -> Table:
    """The plans that were tried, the best first."""
    table = Table(
        "basis plan", title="Plans within the budget", title_justify="left", title_style="bold", caption=caption
    )
    for name in ("kept size", "stored", "perplexity"):
        table.add_column(name, justify="right")
    for trial in trials:
        table.add_row(trial.name, str(trial.width), f"{trial.stored:.3f}", f"{trial.perplexity:.2f}")
    return table


def cut_table(result: CutResult) -> Table:
    """The plans that a cut compared, the one that was taken first."""
    table = Table(
        title="Plans within the budget, the first one taken",
        title_justify="left",
        title_style="bold",
        caption="added loss: nats per token; measured, of the best few, on calibration text held out for it",
    )
    for name in ("stream", "channels", "values", "stored", "added loss,\npredicted", "\nmeasured"):
        table.add_column(name, justify="right")
    for trial in result.trials:
        sizes = trial.sizes
        cut = (span(each) if each else "as before" for each in (sizes.channels, sizes.values))
        added = "" if trial.added is None else f"{trial.added:.3f}"
        table.add_row(str(sizes.width), *cut, f"{sizes.stored:.3f}", f"{sizes.loss:.3f}", added)
    return table


def recovery_table(name: str, recovery: Recovery, note: str) -> Group:
    """Perplexity of the teacher, before and after, and how much of the difference came back; ``note`` below it."""
    before, after, dense = recovery.points[0].perplexity, recovery.best.perplexity, recovery.teacher
    table = Table("", title=f"{name}, recovered", title_justify="left", title_style="bold")
    for column in ("dense", "sliced", "recovered", "won back"):
        table.add_column(column, justify="right")
    share = (before - after) / (before - dense) if before > dense else 0.0
    table.add_row("perplexity", f"{dense:.2f}", f"{before:.2f}", f"{after:.2f}", f"{share:.0%}")
    notes = [f"The weights after {recovery.best.step} of {recovery.points[-1].step} steps.", note]
    if recovery.diverged:
        notes.insert(0, "Training diverged: give a lower --learning-rate.")
    return Group(table, *(Text(each, style="dim") for each in notes))


def score_table(title: str, scores: Mapping[str, Sequence[Score]]) -> Table:
    """The scores of one model, or of two and what the second keeps of the first's; the keys head the columns."""
    table = Table("task", "metric", title=title, title_justify="left", title_style="bold")
    for name in (*scores, *(["recovery"] if len(scores) > 1 else [])):
        table.add_column(name, justify="right")
    for row in zip(*scores.values(), strict=True):
        cells = [f"{each.value:.4f}" + ("" if each.error is None else f" ± {each.error:.4f}") for each in row]
        if len(row) > 1:
            share = row[-1].recovery(row[0])
            cells.append("" if share is None else f"{share:.1%}")
        table.add_row(row[0].task, row[0].metric, *cells)
    return table


def speed_table(title: str, speeds: Speeds, notes: Iterable[str]) -> Group:
    """Prefill and decode speed of each model under each harness, with notes below."""
    table = Table("harness", "model", title=title, title_justify="left", title_style="bold")
    first = speeds.rows[0].model
    for phase in ("prefill", "decode"):
        for name in (f"{phase}\ntok/s", f"\nx {first}", "of\nfloor"):
            table.add_column(name, justify="right")
    base = {row.harness: row for row in speeds.rows if row.model == first}
    for row in speeds.rows:
        against = base[row.harness]
        if row is against and row is not speeds.rows[0]:
            table.add_section()
        table.add_row(
            row.harness,
            row.model,
            f"{row.prefill:.1f}",
            f"{row.prefill / against.prefill:.2f}",
            f"{row.prefill_share:.0%}",
            f"{row.decode:.1f}",
            f"{row.decode / against.decode:.2f}",
            f"{row.decode_share:.0%}",
        )
    return Group(table, *(Text(note, style="dim") for note in notes))


def speed_notes(speeds: Speeds) -> list[str]:
    """What has to be said beside :func:`speed_table`."""
    machine, settings = speeds.machine, speeds.settings
    return [
        f"{settings['dtype']} on {machine['processor']}, {machine['threads']} threads, torch {machine['torch']}, "
        f"transformers {machine['transformers']}, {machine['date']}.",
        f"Batch of {settings['batch']}, prompts of {settings['prompt']} tokens, then {settings['new_tokens']} decode "
        f"steps; all in turn, medians of {settings['rounds']}.",
        f"Floor: weights read at {decimal(speeds.read_bandwidth)}B/s or multiplied at {decimal(speeds.matmul_rate)}"
        "FLOP/s, whichever takes longer; both measured in this run.",
        *(
            f"{name}: {decimal(stored)} stored parameters; a pass reads {decimal(speeds.read_bytes[name])}B of them, "
            f"{decimal(speeds.flops_per_token[name])}FLOPs per token."
            for name, stored in speeds.stored_parameters.items()
        ),
    ]
