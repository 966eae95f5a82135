"""Batches of token ids as users give them, checked and brought into one form."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig

from slicegpt_fast.errors import InputError, reason

Batch = Tensor | Mapping[str, Any]
TOKENS = 512  # that a forward and backward pass takes at once, or one sequence


def batch_list(batches: Iterable[Batch], argument: str = "calibration") -> list[Batch]:
    """Return what is in ``batches``.

    Raises:
        InputError: it is no collection of batches: one batch alone, text, or nothing to iterate over.
    """
    check_iterable(batches, argument)
    return list(batches)


def check_iterable(batches: object, argument: str) -> None:
    """Raise InputError unless ``batches`` can hold batches."""
    is_scalar = isinstance(batches, Tensor | np.ndarray) and batches.ndim == 0
    if isinstance(batches, Mapping | str | bytes) or not isinstance(batches, Iterable) or is_scalar:
        raise InputError(
            f"{argument} must be a list of batches of token ids, not a single {type(batches).__name__}: make them with "
            "token_batches, or put a batch into a list."
        )


def checked(
    batches: Iterable[Batch], config: PreTrainedConfig, device: torch.device, argument: str = "calibration"
) -> Iterator[dict[str, Tensor]]:
    """Yield each batch as ``input_ids`` and ``attention_mask``, both [B, T], on the device.

    A batch is a [B, T] (or [T]) tensor, array or list of integers, or a mapping with ``input_ids`` and, where there is
    padding, an ``attention_mask`` of ones and zeros; other entries of it are ignored.

    Raises:
        InputError: a malformed or empty batch, token ids beyond the vocabulary or positions beyond the table.
    """
    check_iterable(batches, argument)
    for index, batch in enumerate(batches):
        yield _checked(batch, f"{argument}: batch {index}", config, device)


def pieces(batch: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Yield a batch in parts of whole sequences: a graph of all activations stands behind each until its gradients."""
    rows = max(1, TOKENS // batch["input_ids"].shape[1])
    for start in range(0, len(batch["input_ids"]), rows):
        yield {name: each[start : start + rows] for name, each in batch.items()}


def _checked(batch: Batch, name: str, config: PreTrainedConfig, device: torch.device) -> dict[str, Tensor]:
    entries = batch if isinstance(batch, Mapping) else {"input_ids": batch}
    ids = entries.get("input_ids")
    if not isinstance(ids, Tensor | np.ndarray | list | tuple):
        raise InputError(
            f"{name} must be a tensor of token ids or a mapping with input_ids, not {type(batch).__name__}."
        )
    ids = _tensor(ids, f"{name}: input_ids")
    if ids.dim() not in (1, 2) or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise InputError(f"{name}: input_ids must be integers of shape [B, T], not {ids.dtype} {list(ids.shape)}.")
    if not ids.numel():
        raise InputError(f"{name} is empty (input_ids have shape {list(ids.shape)}): leave it out.")
    ids, given = torch.atleast_2d(ids).long(), entries.get("attention_mask")
    mask = torch.ones_like(ids) if given is None else torch.atleast_2d(_tensor(given, f"{name}: attention_mask"))
    if mask.shape != ids.shape:
        raise InputError(f"{name}: attention_mask has shape {list(mask.shape)}, input_ids {list(ids.shape)}.")
    if ((mask != 0) & (mask != 1)).any():
        raise InputError(f"{name}: attention_mask must hold 1 for tokens and 0 for padding, and nothing else.")
    _check_range(ids, name, config)
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def _tensor(values: Any, name: str) -> Tensor:
    if isinstance(values, Tensor):
        return values
    try:
        return torch.as_tensor(values, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"{name} cannot be made a tensor ({reason(error)}): give integers, all rows of one length, padded where "
            "they are shorter."
        ) from error


def _check_range(ids: Tensor, name: str, config: PreTrainedConfig) -> None:
    wrong = ids[(ids < 0) | (ids >= config.vocab_size)]
    if wrong.numel():
        raise InputError(
            f"{name} holds token id {int(wrong[0])}, but the model's vocabulary has {config.vocab_size}: use the "
            "model's own tokenizer."
        )
    positions = getattr(config, "max_position_embeddings", None)
    computed = hasattr(config, "rope_parameters") or getattr(config, "alibi", False)  # not looked up in a table
    if positions and not computed and ids.shape[1] > positions:
        raise InputError(
            f"{name} has sequences of {ids.shape[1]} tokens, but the model has {positions} positions: cut them shorter."
        )
