"""Calibration tokens on their way through the dense model, one norm site at a time."""

from collections.abc import Iterable, Iterator, MutableSequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from slicegpt_fast.architectures import Sublayer, architecture_of, at
from slicegpt_fast.errors import InputError
from slicegpt_fast.slicing.batches import Batch, checked
from slicegpt_fast.slicing.storage import Storage


@dataclass
class Stream:
    """The residual stream of the calibration batches.

    Attributes:
        states: one [B, T, D] tensor per batch.
        counted: per batch, a [B * T] bool tensor that is false at padding, or None where there is none.
        layer_arguments: per batch, the keyword arguments that each decoder layer is called with.
        tokens: how many positions count.
        device: that of the states.
    """

    states: MutableSequence[Tensor]
    counted: list[Tensor | None]
    layer_arguments: list[list[dict[str, Any]]]
    tokens: int
    device: torch.device


@dataclass(frozen=True)
class Stop:
    """A norm site: the norm the stream enters next, and the sublayer behind it (none at the final norm).

    Attributes:
        site: counts the sites.
        index: counts the decoder layers; the final norm comes after the last.
        part: the path of the decoder layer, or of the final norm.
        path: the path of the norm.
    """

    site: int
    index: int
    part: str
    path: str
    norm: nn.Module
    layer: nn.Module | None = None
    sublayer: Sublayer | None = None


def stops(model: PreTrainedModel) -> list[Stop]:
    """The norm sites of a model in the stream's order."""
    architecture = architecture_of(model)
    found = []
    for site, (index, layer, sublayer) in enumerate(architecture.sites(model)):
        part, norm = f"{architecture.layers}.{index}", sublayer.branches[0].norm
        found.append(Stop(site, index, part, f"{part}.{norm}", at(layer, norm), layer, sublayer))
    final = architecture.final_norm
    return [*found, Stop(len(found), found[-1].index + 1, final, final, at(model, final))]


def visit(model: PreTrainedModel, storage: Storage, description: str, *, progress: bool) -> Iterator[Stop]:
    """Yield the norm sites in the stream's order that are left to visit, each while its layer is in memory."""
    layers = [list(sites) for _, sites in groupby(stops(model), key=lambda stop: stop.index)]
    with tqdm(total=sum(map(len, layers)), desc=description, unit="site", disable=not progress) as bar:
        for index in storage.steps(len(layers)):
            with storage.loaded(layers[index][0].part):
                for stop in layers[index]:
                    bar.update(stop.site - bar.n)
                    yield stop
                    bar.update()


def enter(model: PreTrainedModel, calibration: Iterable[Batch], storage: Storage, *, at_least: int) -> Stream:
    """Embed the calibration batches.

    Raises:
        InputError: as of :func:`checked`, or there are fewer than ``at_least`` tokens.
    """
    architecture = architecture_of(model)
    storage.check(model)
    layers = list(at(model, architecture.layers).children())
    with storage.loaded(*architecture.embeddings, architecture.final_norm):
        device = at(model, architecture.embeddings[0]).weight.device
        batches = list(checked(calibration, model.config, device))
        masks = [batch["attention_mask"].bool().flatten() for batch in batches]
        tokens = sum(int(mask.sum()) for mask in masks)
        if tokens < at_least:
            raise InputError(
                f"calibration has {tokens} tokens, but a basis of {at_least} directions needs at least as many: give "
                "more text."
            )
        states, layer_arguments = storage.states("stream"), []
        by_mask: dict[Any, list[dict[str, Any]]] = {}  # equally padded batches share the tensors of their arguments
        for index, batch in enumerate(batches if not storage.finished else []):
            state, arguments = _embed(model, layers, batch)
            if index == len(states):
                states.append(state)
            mask = batch["attention_mask"]
            layer_arguments.append(by_mask.setdefault((mask.shape, mask.cpu().numpy().tobytes()), arguments))
    counted = [None if mask.all() else mask for mask in masks]
    return Stream(states, counted, layer_arguments, tokens, device)


def _embed(model: PreTrainedModel, layers: list[nn.Module], batch: dict[str, Tensor]) -> tuple[Tensor, list[dict]]:
    """The embedded tokens [B, T, D] of a batch, and the keyword arguments that each decoder layer is called with.

    The model's own forward makes them (masks, rotary positions: they differ between releases and layers); the layers
    themselves are stubbed out.
    """
    streams: list[Tensor] = []
    layer_arguments: list[dict[str, Any]] = []

    architecture = architecture_of(model)

    def stub(hidden_states: Tensor, *positional: Any, **arguments: Any) -> Any:
        streams.append(hidden_states)
        layer_arguments.append(arguments | dict(zip(architecture.positional, positional, strict=False)))
        return (hidden_states, None) if architecture.returns_tuple else hidden_states

    inputs = dict(batch)
    if not batch["attention_mask"].all():
        inputs["position_ids"] = (batch["attention_mask"].long().cumsum(-1) - 1).clamp(min=0)
    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(patch.object(layer, "forward", stub))
        model.base_model(**inputs, use_cache=False)
    return streams[0], layer_arguments
