"""The README.md of a sliced model's folder: what it is, how it is loaded, what was measured."""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedModel

from slicegpt_fast.architectures import architecture_of, at
from slicegpt_fast.quantization import count_parameters
from slicegpt_fast.slicing.format import SliceConfig, slice_config_of
from slicegpt_fast.slicing.summary import kept_directions, kept_sizes, shortcuts
from slicegpt_fast.slicing.trust import stock_model

FILE = "README.md"
SEAL = "<!-- written by slicegpt-fast, sha256 "  # and the digest of all above it: an edited file is the user's
TEMPLATE = "This model card has been automatically generated."  # by transformers, which says nothing in it
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+|[\w-]+")


class Figure(NamedTuple):
    """One measure of the dense and of the sliced model, as text."""

    label: str
    dense: str
    sliced: str


def write_card(
    folder: str | Path, model: PreTrainedModel, figures: Sequence[Figure] = (), *, text: str | None = None
) -> None:
    """Write README.md for the sliced ``model`` into ``folder``, unless one stands there that somebody else wrote.

    Args:
        folder: where the model is saved.
        model: sliced; its weights may be on the meta device.
        figures: what was measured; those called "stored parameters", "in decoder blocks" or "bytes" replace what is
            counted here.
        text: what the model was calibrated on, in a few words.
    """
    slice_config = slice_config_of(model)
    file = Path(folder) / FILE
    if slice_config is None or (file.exists() and not _is_ours(file.read_bytes())):
        return
    rows = {figure.label.strip(): figure for figure in (*_sizes(model), *figures)}
    card = _front_matter(model) + _body(model, slice_config, list(rows.values()), text)
    file.write_text(f"{card}{SEAL}{_digest(card.encode())} -->\n", "utf-8")


def replace_template(folder: str | Path, model: PreTrainedModel) -> None:
    """Write the card of ``model`` over one that transformers made from its template."""
    file = Path(folder) / FILE
    if file.exists() and TEMPLATE in file.read_text("utf-8"):
        file.unlink()
        write_card(folder, model)


def base_of(model: Any) -> str | None:
    """The hub id that a dense model was loaded from; None for a folder, which means nothing elsewhere."""
    name = str(model.name_or_path)
    return name if HUB_ID.fullmatch(name) and not Path(name).exists() else None


def _is_ours(content: bytes) -> bool:
    text, mark, rest = content.rpartition(SEAL.encode())
    return bool(mark) and rest == f"{_digest(text)} -->\n".encode()


def _digest(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()


def _front_matter(model: PreTrainedModel) -> str:
    base = getattr(model.config, "sliced_from", None)
    lines = ["library_name: transformers", "pipeline_tag: text-generation", "tags:", "- slicegpt", "- slicegpt-fast"]
    return "\n".join(["---", *([f"base_model: {base}"] if base else []), *lines, "---", "", ""])


def _body(model: PreTrainedModel, slice_config: SliceConfig, figures: Sequence[Figure], text: str | None) -> str:
    made = _made(slice_config)
    table = [f"| {label.strip()} | {dense} | {sliced} |" for label, dense, sliced in figures]
    return "\n".join(
        [
            f"# {getattr(model.config, 'sliced_from', None) or model.config.model_type}, {' and '.join(made)}",
            "",
            f"A language model {' and '.join(made.values())}. It loads",
            "once the package `slicegpt-fast` is imported:",
            "",
            "```python",
            "import slicegpt_fast",
            "from transformers import AutoModelForCausalLM",
            "",
            'model = AutoModelForCausalLM.from_pretrained("path of this folder")',
            "```",
            "",
            *_plan(model, slice_config, text),
            "",
            "| | dense | sliced |",
            "|---|---:|---:|",
            *table,
            *_elsewhere(model, slice_config),
            "",
            "",
        ]
    )


def _made(slice_config: SliceConfig) -> dict[str, str]:
    """What was made of the dense model, in a word and in some more."""
    made = {}
    if slice_config.plan().cuts:
        made["sliced"] = "sliced to fewer rows and columns of its weights (SliceGPT, arXiv 2401.15024)"
    if precision := slice_config.rounding():
        made["quantised"] = f"with weights of {precision.bits} bits"
    return made


def _plan(model: PreTrainedModel, slice_config: SliceConfig, text: str | None) -> list[str]:
    """What was kept, and by what."""
    plan, precision = slice_config.plan(), slice_config.rounding()
    tokens = f"{slice_config.calibration_tokens} tokens" + (f" of {text}" if text else "")
    weights = [f"* Weights: {precision}."] if precision else []
    calibrated = [f"* Calibrated on {tokens}."] if slice_config.calibration_tokens else []
    if plan.cuts_layers:
        return [f"* Kept: {kept_sizes(_dense(model), plan)}.", *weights, *calibrated]
    if not plan.cuts:
        return [*weights, *calibrated]
    return [
        *weights,
        f"* Basis: {plan.basis}, fitted to the {plan.signal} signal of {tokens}.",
        f"* Directions kept: {kept_directions(plan)}, {plan.widths[-1]} at the head; {shortcuts(plan)}.",
    ]


def _elsewhere(model: PreTrainedModel, slice_config: SliceConfig) -> list[str]:
    """What makes of the folder a checkpoint that other engines load; nothing where that is refused."""
    plan, quantised = slice_config.plan(), slice_config.rounding() is not None
    row = architecture_of(model.config)
    one_width = len(set(plan.groups)) == 1 and len(set(plan.widths)) == 1
    stock = one_width and (plan.basis is None or (row.resizable and not row.centered))
    if not stock or len(set(plan.channels)) > 1 or plan.values or quantised:
        return []
    return [
        "",
        "## Other engines",
        "",
        "```sh",
        "slicegpt-fast export PATH --out plain  # then: vllm serve plain; llama.cpp's converter reads it too",
        "```",
    ]


def _dense(model: PreTrainedModel) -> PreTrainedModel:
    """The model before slicing, without weights."""
    return stock_model(type(model), model.config)


def _sizes(model: PreTrainedModel) -> list[Figure]:
    """What follows from the model alone; whether the dense one had its head tied is not recorded."""
    layers = architecture_of(model.config).layers
    dense, sliced = _blocks(_dense(model), layers), _blocks(model, layers)
    stored = count_parameters(model)
    size = sum(parameter.numel() * parameter.itemsize for parameter in model.parameters())
    return [
        Figure("stored parameters", "", f"{stored:,}"),
        Figure("in decoder blocks", f"{dense:,}", f"{sliced:,} ({sliced / dense:.3f})"),
        Figure("bytes", "", f"{size:,}"),
    ]


def _blocks(model: PreTrainedModel, layers: str) -> int:
    return count_parameters(at(model, layers))
