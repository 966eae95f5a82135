"""Find the bases of a plan: run the calibration tokens through the dense model, layer by layer, and take the PCA.

Slicing a site means projecting the stream onto the span of its basis, so the effect of a slice on everything after it
is had from the dense model with ``h <- h Q Q^T`` at that site. A basis known when the stream reaches its site is put to
use at once: later bases are fitted to what the sliced model will really see, as in the published algorithm. A basis
that several sites share is fitted to the dense model's stream.
"""

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from slicegpt_fast.architectures import architecture_of, at
from slicegpt_fast.errors import InputError
from slicegpt_fast.ops.covariance import covariance_
from slicegpt_fast.slicing.layers import norm_eps, rstd, run_sublayer
from slicegpt_fast.slicing.plan import SlicePlan

Batch = Tensor | Mapping[str, Tensor]


@dataclass(frozen=True)
class Bases:
    """The bases of a plan, fitted to calibration text.

    Attributes:
        plan: the plan they belong to.
        matrices: one [D, d] fp64 matrix with orthonormal columns per basis.
        spectra: [number of bases, D] fp64, the descending eigenvalues of the covariance each basis came from.
        tokens: how many calibration tokens were counted.
    """

    plan: SlicePlan
    matrices: tuple[Tensor, ...]
    spectra: Tensor
    tokens: int


def principal_components(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Descending eigenvalues [D] and eigenvectors [D, D] (columns) of a symmetric matrix, in fp64.

    The largest component of every eigenvector is made positive, so equal covariances give equal bases.
    """
    values, vectors = torch.linalg.eigh(covariance.double())
    values, vectors = values.flip(0), vectors.flip(1)
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return values, vectors * largest.sign()


@torch.no_grad()
def find_bases(
    model: PreTrainedModel, calibration: Iterable[Batch], plan: SlicePlan, *, progress: bool = True
) -> Bases:
    """Fit the bases of ``plan`` to the stream of the dense ``model`` on calibration tokens.

    Args:
        model: the dense model; unchanged on return.
        calibration: token batches, each a [B, T] (or [T]) integer tensor or a mapping with ``input_ids`` and, where
            there is padding, ``attention_mask``. Padded positions count nowhere.
        plan: from :func:`make_plan` on the same model.
        progress: show a progress bar over the norm sites.

    Raises:
        InputError: no or too few tokens, token ids beyond the vocabulary, or activations that are not finite.
    """
    architecture = architecture_of(model)
    full = plan.full_width
    device = at(model, architecture.embeddings[0]).weight.device
    batches = [_checked(batch, index, model.config.vocab_size, device) for index, batch in enumerate(calibration)]
    counted = [batch["attention_mask"].bool().flatten() for batch in batches]
    tokens = sum(int(mask.sum()) for mask in counted)
    if tokens < max(plan.widths):
        raise InputError(
            f"calibration has {tokens} tokens, but a basis of {max(plan.widths)} directions needs at least as many: "
            "give more text."
        )

    training = model.training
    model.eval()
    try:
        layers = list(at(model, architecture.layers).children())
        streams, layer_arguments = map(list, zip(*(_enter(model, layers, batch) for batch in batches), strict=True))
        spectra, matrices = [], []
        sites = [*architecture.sites(model), None]  # None: the final norm, which has no sublayer
        for site, place in enumerate(tqdm(sites, desc="calibrating", unit="site", disable=not progress)):
            if architecture.centered:
                streams = [stream - stream.mean(-1, keepdim=True) for stream in streams]
            if place:
                index, layer, sublayer = place
                parent, norm = f"{architecture.layers}.{index}.", sublayer.branches[0].norm
            else:
                parent, norm = "", architecture.final_norm
            opens_group = site == 0 or plan.has_shortcut(site - 1)
            closes_group = place is None or plan.has_shortcut(site)
            if opens_group:
                covariance = torch.zeros(full, full, dtype=torch.float64, device=device)
            eps = norm_eps(at(model, parent + norm))
            for stream, mask in zip(streams, counted, strict=True):
                rows = stream.flatten(0, 1)
                scale = rstd(rows, full, eps).squeeze(1) if plan.signal == "normalized" else None
                covariance_(covariance, rows, scale, mask)
            if not covariance.diagonal().isfinite().all():
                raise InputError(
                    f"the activations entering {parent}{norm} are not finite in {model.dtype}: check the weights, or "
                    "load the model in a wider dtype."
                )
            if closes_group:
                values, vectors = principal_components(covariance)
                spectra.append(values)
                matrices.append(vectors[:, : plan.widths[site]].clone())
            if opens_group and closes_group:
                projection = (matrices[-1] @ matrices[-1].T).to(model.dtype)
                streams = [stream @ projection for stream in streams]
            if place:
                for i, arguments in enumerate(layer_arguments):
                    streams[i] = streams[i] + run_sublayer(layer, sublayer, streams[i], **arguments[index])[0]
    finally:
        model.train(training)
    return Bases(plan, tuple(matrices), torch.stack(spectra), tokens)


def _checked(batch: Batch, index: int, vocab_size: int, device: torch.device) -> dict[str, Tensor]:
    """One calibration batch as ``input_ids`` and ``attention_mask``, both [B, T], on the model's device."""
    name = f"calibration batch {index}"
    if isinstance(batch, Tensor):
        batch = {"input_ids": batch}
    if not isinstance(batch, Mapping) or not isinstance(batch.get("input_ids"), Tensor):
        raise InputError(
            f"{name} must be a tensor of token ids or a mapping with input_ids, not {type(batch).__name__}."
        )
    ids = torch.atleast_2d(batch["input_ids"])
    mask = batch.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else torch.atleast_2d(mask)
    if ids.dim() != 2 or ids.is_floating_point():
        raise InputError(f"{name}: input_ids must be integers of shape [B, T], not {ids.dtype} {list(ids.shape)}.")
    if mask.shape != ids.shape:
        raise InputError(f"{name}: attention_mask has shape {list(mask.shape)}, input_ids {list(ids.shape)}.")
    wrong = ids[(ids < 0) | (ids >= vocab_size)]
    if wrong.numel():
        raise InputError(
            f"{name} holds token id {int(wrong[0])}, but the model's vocabulary has {vocab_size}: use the model's own "
            "tokenizer."
        )
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def _enter(model: PreTrainedModel, layers: list[nn.Module], batch: dict[str, Tensor]) -> tuple[Tensor, list[dict]]:
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
