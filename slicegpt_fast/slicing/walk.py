"""Calibration tokens on their way through the dense model, one norm site at a time."""

from collections.abc import Callable, Iterable, Iterator, MutableSequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from slicegpt_fast.architectures import Architecture, Decoder, Site
from slicegpt_fast.errors import InputError
from slicegpt_fast.slicing.batches import Batch, checked
from slicegpt_fast.slicing.layers import normalise, run_branches
from slicegpt_fast.slicing.storage import Storage


@dataclass
class Stream:
    """The residual stream of the calibration batches.

    Attributes:
        states: one [B, T, D] tensor per batch.
        counted: per batch, a [B * T] bool tensor that is false at padding, or None where there is no padding.
        layer_arguments: per batch, the keyword arguments that each decoder layer is called with.
        tokens: how many positions count.
        device: that of the states.
        architecture: the model's row of the table.
    """

    states: MutableSequence[Tensor]
    counted: list[Tensor | None]
    layer_arguments: list[list[dict[str, Any]]]
    tokens: int
    device: torch.device
    architecture: Architecture

    def batches(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield each batch's states, without their mean where norms subtract it, and which of their rows count."""
        for index, mask in enumerate(self.counted):
            states = self.states[index]
            if self.architecture.centered:
                states = self.states[index] = without_mean(states)
            yield states, mask

    def advance(self, site: Site, deleted: Tensor | None = None) -> None:
        """Bring the stream to the next site, first rid of the orthonormal directions ``deleted`` [D, n]."""
        if site.sublayer is None:
            return
        for index in range(len(self.layer_arguments)):
            state = self.states[index]
            if deleted is not None:
                state = state - state @ deleted @ deleted.T
            self.states[index] = state + self.output(site, index, normalise(site.part, site.sublayer, state))

    def output(self, site: Site, index: int, normalised: dict[str, Tensor]) -> Tensor:
        """Return what the site's sublayer makes of a batch: its normalised states, by the norm's path -> [B, T, D]."""
        assert site.sublayer is not None
        output, _ = run_branches(site.part, site.sublayer, normalised, **self.layer_arguments[index][site.index])
        return output


def without_mean(states: Tensor) -> Tensor:
    """Subtract the mean of the last dimension."""
    return states - states.mean(-1, keepdim=True)


def visit(decoder: Decoder, storage: Storage, description: str, *, progress: bool) -> Iterator[Site]:
    """Yield the norm sites in the stream's order that are left to visit, each while its layer is in memory."""
    layers = [list(sites) for _, sites in groupby(decoder.sites, key=lambda site: site.index)]
    with tqdm(total=sum(map(len, layers)), desc=description, unit="site", disable=not progress) as bar:
        for index in storage.steps(len(layers)):
            with storage.loaded(layers[index][0].path):
                for site in layers[index]:
                    bar.update(site.number - bar.n)
                    yield site
                    bar.update()


def enter(decoder: Decoder, calibration: Iterable[Batch], storage: Storage, *, at_least: int) -> Stream:
    """Embed the calibration batches.

    Raises:
        InputError: as of :func:`checked`, or there are fewer than ``at_least`` tokens.
    """
    storage.check(decoder.model)
    with storage.loaded(*decoder.embeddings, decoder.sites[-1].path):
        device = next(iter(decoder.embeddings.values())).weight.device
        batches = list(checked(calibration, decoder.model.config, device))
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
            state, arguments = _embed(decoder, batch)
            if index == len(states):
                states.append(state)
            mask = batch["attention_mask"]
            layer_arguments.append(by_mask.setdefault((mask.shape, mask.cpu().numpy().tobytes()), arguments))
    counted = [None if mask.all() else mask for mask in masks]
    return Stream(states, counted, layer_arguments, tokens, device, decoder.architecture)


def _embed(decoder: Decoder, batch: dict[str, Tensor]) -> tuple[Tensor, list[dict]]:
    """The embedded tokens [B, T, D] of a batch, and the keyword arguments that each decoder layer is called with.

    The model's own forward makes them (masks, rotary positions: they differ between releases and layers); the layers
    themselves only record what they are called with.
    """
    states: list[Tensor] = []
    layer_arguments: list[dict[str, Any]] = []
    architecture = decoder.architecture

    def record(hidden_states: Tensor, *positional: Any, **arguments: Any) -> Any:
        states.append(hidden_states)
        layer_arguments.append(arguments | dict(zip(architecture.positional, positional, strict=False)))
        return (hidden_states, None) if architecture.returns_tuple else hidden_states

    inputs = dict(batch)
    if not batch["attention_mask"].all():
        inputs["position_ids"] = (batch["attention_mask"].long().cumsum(-1) - 1).clamp(min=0)
    with _running(record, decoder.layers):
        decoder.model.base_model(**inputs, use_cache=False)
    return states[0], layer_arguments


@contextmanager
def _running(forward: Callable[..., Any], modules: list[nn.Module]) -> Iterator[None]:
    """Inside, the modules run ``forward`` in place of their own."""
    before = [vars(module).get("forward") for module in modules]
    for module in modules:
        vars(module)["forward"] = forward
    try:
        yield
    finally:
        for module, own in zip(modules, before, strict=True):
            del vars(module)["forward"]
            if own is not None:
                vars(module)["forward"] = own
