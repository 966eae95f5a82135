"""Text for calibration and evaluation: files, folders and Hugging Face datasets, cut into windows of tokens.

documents (files, dataset rows) -> one text, documents joined by a blank line -> token windows [n, length]

A text is tokenised a piece at a time, so memory grows with the windows that are wanted and not with the text.
"""

import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from slicegpt_fast.errors import InputError, is_whole, reason
from slicegpt_fast.text_files import text_documents, text_field

__all__ = ["batched", "dataset_documents", "join_documents", "text_documents", "token_batches", "token_windows"]

TOKENS_PER_BATCH = 2048
PIECE = 1 << 16  # characters of a text that are tokenised at a time
OVERLAP = 256  # tokens at the end of a piece that the next one repeats
AGREEING = 32  # how many of them in a row must be the same in both

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
    found = column if column in texts else text_field(None, texts)
    if found is None:
        raise InputError(
            f"dataset {name} has no column of text named {column!r} (it has {', '.join(features)}): write its text to "
            "a file and use that."
        )
    return found


def join_documents(documents: Iterable[str], seed: int | None = None) -> str:
    """One text: the documents joined by a blank line, in order, or shuffled by ``random.Random(seed).shuffle``."""
    documents = list(documents)
    if seed is not None:
        random.Random(int(seed)).shuffle(documents)  # numpy's numbers are no seeds
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
    if seed is not None and not is_whole(seed):
        raise InputError(f"seed must be a whole number or None, not {seed!r}.")
    count = 1 if sequences is None else sequences
    return batched(token_windows(tokenizer, join_documents(documents, seed), length, count=count, limit=sequences))


def token_windows(
    tokenizer: PreTrainedTokenizerBase, text: str, length: int, *, count: int = 1, limit: int | None = None
) -> Tensor:
    """Cut a text into consecutive windows of ``length`` tokens, without special tokens; a shorter rest is dropped.

    Args:
        tokenizer: the model's.
        text: the text.
        length: tokens per window.
        count: how many windows there must be at least.
        limit: how many are wanted at most; None for all. What is behind them is not tokenised.

    Returns:
        LongTensor [n, length], the first windows of the text: n >= count.

    Raises:
        InputError: an argument is of the wrong type or out of range, or the text is too short.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise InputError(f"tokenizer must be one of transformers, not {type(tokenizer).__name__}: use load_tokenizer.")
    if not is_whole(length) or not is_whole(count):
        raise InputError(f"the length {length!r} and the number {count!r} of windows must be whole numbers.")
    if length < 2 or count < 1:
        raise InputError(f"{count} windows of {length} tokens are no text: ask for 1 of 2 tokens at least.")
    pieces, found = [], 0
    for piece in _token_pieces(tokenizer, text):
        pieces.append(torch.tensor(piece, dtype=torch.long))
        found += len(piece)
        if limit is not None and found >= limit * length:
            break
    if found < count * length:
        raise InputError(
            f"the text has {found} tokens, but {count * length} are needed ({count} windows of {length}): give "
            "more text, or ask for fewer or shorter windows."
        )
    tokens = torch.cat(pieces)
    return tokens[: found // length * length].view(-1, length)[:limit]


def _token_pieces(tokenizer: PreTrainedTokenizerBase, text: str) -> Iterator[list[int]]:
    """Yield the tokens of a text, a piece after the other: the same tokens as of the whole text.

    A cut changes the tokens around it: a word may be split, and what a tokenizer does to the beginning of a text it
    does to every piece. So each piece begins before the one in front of it ends, and takes over within a run of tokens
    that are the same in both, at the same characters: neither cut reaches there. Where there is no such run, the piece
    is made longer, up to all of the text. A tokenizer that does not tell characters gets the whole text.
    """
    if not tokenizer.is_fast:
        yield tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return
    begin, size, first = 0, PIECE, 0  # the piece, and the first of its tokens that is not yielded yet
    tokens = _located_tokens(tokenizer, text, begin, size)
    while begin + size < len(text):
        tail = tokens[max(first, len(tokens) - OVERLAP) :]
        following = tail[0][1] if tail else begin
        after = _located_tokens(tokenizer, text, following, PIECE) if following > begin else []
        agreement = _agreement(tail, after[: 2 * OVERLAP])
        if agreement is None:
            size *= 2
            tokens = _located_tokens(tokenizer, text, begin, size)
            continue
        yield [token for token, *_ in tokens[first : len(tokens) - len(tail) + agreement[0]]]
        begin, size, first, tokens = following, PIECE, agreement[1], after
    yield [token for token, *_ in tokens[first:]]


Located = tuple[int, int, int]  # a token, and the characters of the text where it begins and ends


def _located_tokens(tokenizer: PreTrainedTokenizerBase, text: str, begin: int, size: int) -> list[Located]:
    piece = text[begin : begin + size]
    encoded = tokenizer(piece, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
    places = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    return [(token, begin + start, begin + end) for token, (start, end) in places]


def _agreement(tail: list[Located], head: list[Located]) -> tuple[int, int] | None:
    """Where, in both, the middle of the first run of equal tokens is that is long enough."""
    for i in range(len(tail) - AGREEING + 1):
        if tail[i] in head:
            j = head.index(tail[i])
            if tail[i : i + AGREEING] == head[j : j + AGREEING]:
                return i + AGREEING // 2, j + AGREEING // 2
    return None


def batched(windows: Tensor) -> tuple[Tensor, ...]:
    """Split windows [n, length] into batches [B, length] of about 2048 tokens."""
    return windows.split(max(1, TOKENS_PER_BATCH // windows.shape[1]))
