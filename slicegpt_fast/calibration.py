"""Text for calibration and evaluation: files, folders and Hugging Face datasets, cut into windows of tokens.

documents (files, dataset rows) -> one text, documents joined by a blank line -> token windows [n, length]
"""

import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from slicegpt_fast.errors import InputError, reason

TEXT_SUFFIXES = (".txt", ".md")  # what a folder is searched for; a file that is named itself may end in anything
TOKENS_PER_BATCH = 2048

Purpose = Literal["calibration", "evaluation"]


@dataclass(frozen=True)
class Dataset:
    """Where a Hugging Face dataset keeps its text: arguments of ``load_dataset``, a split per purpose, a column."""

    path: str
    options: Mapping[str, Any] = field(default_factory=dict)
    calibration: str = "train"
    evaluation: str = "test"
    column: str = "text"


# The corpora that compression papers report on. Alpaca has one split. C4 is huge, so only the head of one file is read.
# The Penn Treebank is published as a loading script, so the files it was converted to are named instead.
DATASETS = {
    "wikitext2": Dataset("Salesforce/wikitext", {"name": "wikitext-2-raw-v1"}),
    "alpaca": Dataset("tatsu-lab/alpaca", calibration="train[:90%]", evaluation="train[90%:]"),
    "c4": Dataset(
        "allenai/c4",
        {
            "data_files": {
                "train": "en/c4-train.00000-of-01024.json.gz",
                "validation": "en/c4-validation.00000-of-00008.json.gz",
            },
            "verification_mode": "no_checks",  # the recorded sizes are those of all files together
        },
        calibration="train[:10000]",
        evaluation="validation[:1100]",
    ),
    "ptb": Dataset(
        "ptb-text-only/ptb_text_only",
        {
            "revision": "refs/convert/parquet",
            "data_files": {split: f"penn_treebank/{split}/*.parquet" for split in ("train", "validation", "test")},
        },
        column="sentence",
    ),
}


def text_documents(paths: Iterable[str | Path]) -> list[str]:
    """The text of each file, in the order given; a folder stands for its .txt and .md files at any depth, sorted.

    Raises:
        InputError: a path does not exist, a folder holds no text file, or a file cannot be read as UTF-8.
    """
    return [_read(file) for path in paths for file in _files(Path(path).expanduser())]


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise InputError(f"text {path} does not exist: give text files or folders of text files.")
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in TEXT_SUFFIXES and file.is_file())
    if not files:
        raise InputError(f"folder {path} holds no {' or '.join(TEXT_SUFFIXES)} file: name the text files themselves.")
    return files


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"text {file} is not UTF-8 (byte {error.start} is not): convert it to UTF-8.") from error
    except OSError as error:
        raise InputError(f"text {file} cannot be read ({error.strerror}): check its permissions.") from error


def dataset_documents(name: str, purpose: Purpose, split: str | None = None) -> list[str]:
    """The rows of a Hugging Face dataset, in order.

    Args:
        name: a key of ``DATASETS``; or any dataset as ``path`` or ``path:config``, whose text is the column "text" or
            else the only column of strings.
        purpose: chooses the split where none is given: "train" to calibrate, "test" to evaluate, unless ``DATASETS``
            says otherwise.
        split: any split that ``load_dataset`` understands, such as "validation" or "train[:1000]".

    Raises:
        InputError: the package datasets is missing; the dataset does not exist, is out of reach or holds no text.
    """
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            f"dataset {name} needs the package datasets: pip install datasets, or use text files."
        ) from error
    path, _, config = name.partition(":")
    source = DATASETS.get(name) or Dataset(path, {"name": config or None})
    try:
        rows = datasets.load_dataset(source.path, split=split or getattr(source, purpose), **source.options)
    except datasets.exceptions.DatasetNotFoundError as error:
        raise InputError(
            f"dataset {name} does not exist or is not public: give one of {', '.join(DATASETS)}, or another of the hub."
        ) from error
    except ConnectionError as error:
        raise InputError(
            f"dataset {name} cannot be downloaded and is not in the local cache: go online, or use text files."
        ) from error
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise InputError(f"dataset {name} cannot be loaded: {reason(error)}.") from error
    return [text for text in rows[_text_column(name, source.column, rows.features)] if text is not None]


def _text_column(name: str, column: str, features: Mapping[str, Any]) -> str:
    texts = [key for key, feature in features.items() if getattr(feature, "dtype", None) in ("string", "large_string")]
    if column in texts:
        return column
    if len(texts) == 1:
        return texts[0]
    raise InputError(
        f"dataset {name} has no column of text named {column!r} (it has {', '.join(features)}): write its text to a "
        "file and use that."
    )


def join_documents(documents: Iterable[str], seed: int | None = None) -> str:
    """One text: the documents joined by a blank line, in order, or shuffled by ``random.Random(seed).shuffle``."""
    documents = list(documents)
    if seed is not None:
        random.Random(seed).shuffle(documents)
    return "\n\n".join(documents)


def token_batches(
    tokenizer: PreTrainedTokenizerBase,
    text: str | Iterable[str],
    *,
    length: int = 2048,
    sequences: int | None = 128,
    seed: int | None = 0,
) -> tuple[Tensor, ...]:
    """Return batches of token ids for :func:`slicegpt_fast.slice_model` and :func:`slicegpt_fast.perplexity`.

    The documents are joined by a blank line and cut into consecutive sequences, without special tokens. The defaults
    are those of ``slicegpt-fast slice``.

    Args:
        tokenizer: the model's.
        text: one text, or a list of documents.
        length: tokens per sequence; no more than the model has positions.
        sequences: how many; None for all that the text has.
        seed: shuffles the documents; None keeps their order.

    Returns:
        Batches, LongTensors [B, length] of about 2048 tokens each.

    Raises:
        InputError: an argument is of the wrong type or out of range, or the text is too short.
    """
    if not isinstance(text, Iterable):
        raise InputError(f"text must be a string or a list of strings, not {type(text).__name__}: read files first.")
    documents = [text] if isinstance(text, str) else list(text)
    for index, document in enumerate(documents):
        if not isinstance(document, str):
            raise InputError(
                f"document {index} of text must be a string, not {type(document).__name__}: give a list of strings."
            )
    count = 1 if sequences is None else sequences
    return batched(token_windows(tokenizer, join_documents(documents, seed), length, count=count)[:sequences])


def token_windows(tokenizer: PreTrainedTokenizerBase, text: str, length: int, *, count: int = 1) -> Tensor:
    """Cut a text into consecutive windows of ``length`` tokens, without special tokens; a shorter rest is dropped.

    Args:
        tokenizer: the model's.
        text: the text.
        length: tokens per window.
        count: how many windows there must be at least.

    Returns:
        LongTensor [n, length], every window of the text: n >= count.

    Raises:
        InputError: the length or the count is out of range, or the text is too short.
    """
    if length < 2 or count < 1:
        raise InputError(f"{count} windows of {length} tokens are no text: ask for 1 of 2 tokens at least.")
    tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if len(tokens) < count * length:
        raise InputError(
            f"the text has {len(tokens)} tokens, but {count * length} are needed ({count} windows of {length}): give "
            "more text, or ask for fewer or shorter windows."
        )
    return torch.tensor(tokens[: len(tokens) // length * length], dtype=torch.long).view(-1, length)


def batched(windows: Tensor) -> tuple[Tensor, ...]:
    """Split windows [n, length] into batches [B, length] of about 2048 tokens."""
    return windows.split(max(1, TOKENS_PER_BATCH // windows.shape[1]))
