"""Recovery: a sliced model is trained to predict what the dense one predicts, and wins back what the cut lost.

    dense model --> its K likeliest next tokens at every position, on disk --> (its memory is free again)
        --> sliced model: all weights of its decoder layers, or low-rank adapters merged at the end, against these

SmolLM2-135M cut to 0.8 of its blocks wins back 44 % of the perplexity that it lost in 100 steps of 1024 tokens, 20
minutes on two cores (docs/benchmarks/recovery.md).

The loss is the divergence from the teacher's distributions, not the text's own next tokens: a distribution tells more
than one token, and a small text is not learnt by heart. Held-out text says which weights are kept.

Memory of a run that trains P parameters: the model, beside it 12 P bytes (their gradients and the two moments of AdamW
in fp32), and the activations of 512 tokens. Where all weights are trained they are in fp32; adapters of rank r make P
2 r / width of the weights, and these stay in their own dtype.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from slicegpt_fast.architectures import Decoder, evaluating
from slicegpt_fast.errors import InputError
from slicegpt_fast.evaluation import perplexity
from slicegpt_fast.quantization import quantized_modules
from slicegpt_fast.recovery.teacher import BYTES, Lessons
from slicegpt_fast.recovery.training import Diverged, Point, Training
from slicegpt_fast.slicing.batches import Batch, checked
from slicegpt_fast.unfinished import Settings, digest_of, hold

__all__ = ["Point", "Recovery", "Trained", "recover_model"]

Trained = Literal["all", "lora"]
RATES: dict[Trained, float] = {"all": 2e-4, "lora": 1e-3}
EVERY = 20  # steps between two looks at the held-out text
PATIENCE = 4  # looks without a better perplexity, after which training ends


@dataclass(frozen=True)
class Recovery:
    """What a run came to.

    Attributes:
        model: the given model, with the weights of the best point.
        points: what was measured on the way, the first before training.
        best: the point whose weights were kept.
        teacher: the teacher's perplexity on the held-out text.
        diverged: training ended because its loss was no longer a finite number.
    """

    model: PreTrainedModel
    points: tuple[Point, ...]
    best: Point
    teacher: float
    diverged: bool


def recover_model(
    model: PreTrainedModel,
    teacher: PreTrainedModel | Callable[[], PreTrainedModel],
    text: Iterable[Batch],
    held_out: Iterable[Batch],
    *,
    train: Trained = "all",
    steps: int | None = None,
    learning_rate: float | None = None,
    rank: int = 32,
    work: str | Path | None = None,
    progress: bool = True,
) -> Recovery:
    """Train a sliced model, in place, to predict what the dense model predicts.

    Args:
        model: sliced, in memory, not quantised.
        teacher: the dense model, or what loads it: called if its predictions are not there yet, and forgotten after.
        text: token batches to learn from, as for :func:`slicegpt_fast.slice_model`.
        held_out: token batches; the weights with the lowest perplexity on them are kept.
        train: ``"all"`` weights of the decoder layers, or ``"lora"``: adapters of their linear layers, through peft,
            which are merged at the end.
        steps: of the optimiser, a batch each; by default as many as there are batches.
        learning_rate: the highest of a cosine with a warm-up; by default 2e-4, with ``"lora"`` 1e-3.
        rank: of the adapters.
        work: a folder for the teacher's predictions and the state of the run. The same call, after it was killed,
            goes on from there to the same weights. By default a temporary one.
        progress: show progress bars.

    Raises:
        InputError: with one sentence on what to change; as :func:`slicegpt_fast.perplexity`.
    """
    _check(model, train, steps, learning_rate, rank)
    batches, measured = (
        list(checked(each, model.config, torch.device("cpu"), name))
        for each, name in ((text, "text"), (held_out, "held_out"))
    )
    if not batches or not measured:
        raise InputError(f"{'held_out' if batches else 'text'} holds no batch: give token batches.")
    steps, learning_rate = steps or len(batches), learning_rate or RATES[train]
    asked: Settings = {"train": train, "steps": steps, "learning rate": learning_rate, "rank": rank}
    asked |= {"text": digest_of(batches), "held-out text": digest_of(measured), "weights": _checksum(model)}
    asked |= {name: version(name) for name in ("slicegpt-fast", "torch", "transformers")}
    size = BYTES * sum(batch["input_ids"].numel() for batch in batches) + 16 * sum(map(torch.numel, model.parameters()))
    with TemporaryDirectory() if work is None else nullcontext(work) as parent:
        folder = Path(parent) / "run" if work is None else Path(parent)
        with hold(folder, asked, size):
            lessons = Lessons(folder, batches)
            told = lessons.teacher(teacher, measured, model.config.vocab_size, progress=progress)
            with _trained(model, train, rank) as parameters, evaluating(model):
                training = Training(model, parameters, steps, learning_rate)
                diverged = _train(training, model, lessons, measured, folder, steps, progress)
    if diverged:
        warnings.warn(
            f"training diverged after {training.done} steps: the weights of step {training.best().step} are kept. Give "
            "a lower learning_rate.",
            stacklevel=2,
        )
    return Recovery(model, tuple(training.points), training.best(), told, diverged)


def _check(model: PreTrainedModel, train: str, steps: int | None, learning_rate: float | None, rank: int) -> None:
    if quantized_modules(model):
        raise InputError("the model is quantised: recover the one that it was made from, and quantise that.")
    if train not in get_args(Trained):
        raise InputError(f"train must be 'all' or 'lora', not {train!r}.")
    for name, value in (("steps", steps), ("rank", rank)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise InputError(f"{name} must be a whole number of at least 1, not {value!r}.")
    if learning_rate is not None and not (math.isfinite(learning_rate) and learning_rate > 0):
        raise InputError(f"learning_rate must be greater than 0, not {learning_rate!r}.")


def _train(
    training: Training,
    model: PreTrainedModel,
    lessons: Lessons,
    held_out: Sequence[dict[str, Tensor]],
    folder: Path,
    steps: int,
    progress: bool,
) -> bool:
    """Take the steps that are left, and load the best weights; return whether the loss diverged."""
    if not training.load(folder):
        training.points.append(Point(0, math.nan, perplexity(model, held_out)))
        training.save(folder)
    losses: list[float] = []
    diverged = False
    with tqdm(total=steps, initial=training.done, desc="recovery", unit="step", disable=not progress) as bar:
        while training.done < steps and not training.stale(PATIENCE):
            try:
                losses.append(training.step(*lessons.of(training.done, model.device)))
            except Diverged:
                diverged = True
                break
            bar.update()
            if training.done % EVERY == 0 or training.done == steps:
                training.points.append(Point(training.done, sum(losses) / len(losses), perplexity(model, held_out)))
                training.save(folder)
                bar.set_postfix(divergence=training.points[-1].loss, perplexity=training.points[-1].perplexity)
                losses.clear()
    training.load_best(folder)
    return diverged


@contextmanager
def _trained(model: PreTrainedModel, train: Trained, rank: int) -> Iterator[dict[str, nn.Parameter]]:
    """Inside, the parameters that are trained, by name, ready for it; after, the model is an ordinary one again."""
    before = {parameter: (parameter.requires_grad, parameter.dtype) for parameter in model.parameters()}
    layers = {module for layer in Decoder(model).layers for module in layer.modules()}
    for parameter in before:
        parameter.requires_grad_(False)
    try:
        if train == "lora":
            with _adapted(model, layers, rank) as parameters:
                yield parameters
        else:
            yield _in_fp32(model, layers)
    finally:
        for parameter, (trained, dtype) in before.items():
            parameter.data = parameter.data.to(dtype)
            parameter.requires_grad_(trained)
            parameter.grad = None


def _in_fp32(model: PreTrainedModel, layers: set[nn.Module]) -> dict[str, nn.Parameter]:
    """Give a model fp32 parameters; return those of its decoder layers, which take gradients from now on."""
    for parameter in model.parameters():
        parameter.data = parameter.data.float()
    inside = {id(parameter) for module in layers for parameter in module.parameters(recurse=False)}
    trained = {name: parameter for name, parameter in model.named_parameters() if id(parameter) in inside}
    for parameter in trained.values():
        parameter.requires_grad_(True)
    return trained


@contextmanager
def _adapted(model: PreTrainedModel, layers: set[nn.Module], rank: int) -> Iterator[dict[str, nn.Parameter]]:
    """Put adapters on the linear layers; merge them after, or take them away where something went wrong."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise InputError("train='lora' needs peft: install it (pip install 'slicegpt-fast[lora]').") from error
    linear = [path for path, each in model.named_modules() if each in layers and isinstance(each, nn.Linear | Conv1D)]
    with torch.random.fork_rng(), warnings.catch_warnings():
        torch.manual_seed(0)  # a run that was killed starts from the same adapters
        warnings.filterwarnings("ignore", "fan_in_fan_out")
        adapted: Any = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=linear))
    try:
        yield {name: each for name, each in adapted.named_parameters() if each.requires_grad}
    except BaseException:
        adapted.unload()
        raise
    adapted.merge_and_unload()


def _checksum(model: PreTrainedModel) -> str:
    """What changes with any weight of a model, but by chance."""
    return f"{sum(parameter.double().sum().item() for parameter in model.parameters()):.17g}"
