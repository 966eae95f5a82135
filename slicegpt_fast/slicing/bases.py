"""Find the bases of a plan: run the calibration tokens through the dense model, layer by layer, and take the PCA.

Slicing a site means projecting the stream onto the span of its basis, so the effect of a slice on everything after it
is had from the dense model with ``h <- h Q Q^T`` at that site. Where every site has its own basis, each is put to use
as soon as it is known: later bases are fitted to what the sliced model will really see, as in the published algorithm.
Bases that several sites share are fitted to the dense model's stream.
"""

from collections.abc import Iterable, MutableSequence, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from slicegpt_fast.architectures import Decoder, Site, at, evaluating
from slicegpt_fast.errors import InputError
from slicegpt_fast.ops.covariance import covariance_
from slicegpt_fast.slicing.batches import Batch
from slicegpt_fast.slicing.layers import norm_eps, rstd
from slicegpt_fast.slicing.plan import SlicePlan
from slicegpt_fast.slicing.range import StreamRange
from slicegpt_fast.slicing.storage import IN_MEMORY, Storage
from slicegpt_fast.slicing.walk import Stream, enter, visit, without_mean

REFIT_DAMPING = 0.01  # of the mean diagonal of X^T X


@dataclass(frozen=True)
class Bases:
    """The bases of a plan, fitted to calibration text.

    Attributes:
        plan: the plan they belong to.
        matrices: one [D, d] fp64 matrix with orthonormal columns per basis.
        spectra: [number of bases, D] fp64, the descending eigenvalues of the covariance each basis came from.
        tokens: how many calibration tokens were counted.
        readers: one [D, d] matrix per site, what its readers' inputs are mapped by; empty unless they were re-fitted.
    """

    plan: SlicePlan
    matrices: Sequence[Tensor]
    spectra: Tensor
    tokens: int
    readers: Sequence[Tensor] = ()

    def basis(self, site: int) -> Tensor:
        """The basis of a site."""
        return self.matrices[self.plan.groups[site]]

    def reader(self, site: int) -> Tensor:
        """What the inputs of a site's readers are mapped by: its basis unless re-fitted."""
        return self.readers[site] if self.readers else self.basis(site)


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
    model: PreTrainedModel,
    calibration: Iterable[Batch],
    plan: SlicePlan,
    *,
    storage: Storage = IN_MEMORY,
    progress: bool = True,
) -> Bases:
    """Fit the bases of ``plan`` to the stream of the dense ``model`` on calibration tokens.

    Args:
        model: the dense model; unchanged on return.
        calibration: token batches, each a [B, T] (or [T]) integer tensor or a mapping with ``input_ids`` and, where
            there is padding, ``attention_mask``. Padded positions count nowhere.
        plan: from :func:`make_plan` on the same model.
        storage: where the weights are found and the work is kept.
        progress: show a progress bar over the norm sites.

    Raises:
        InputError: no or too few tokens, token ids beyond the vocabulary, or activations that are not finite.
    """
    decoder = Decoder(model)
    each_its_own = len(set(plan.groups)) == len(plan.groups)
    spectra, matrices = storage.tensors("spectra"), storage.tensors("matrices")
    unfinished = storage.tensors("covariance")  # of the sites so far, where the next one shares their basis
    with evaluating(model):
        stream = enter(decoder, calibration, storage, at_least=max(plan.widths))
        stream_range = StreamRange(model.dtype)
        for site in visit(decoder, storage, "calibrating", progress=progress):
            covariance = unfinished.pop() if unfinished else _square(plan.full_width, stream.device)
            _add_covariance_(covariance, stream, site, plan, stream_range)
            deleted = None
            if site.sublayer is None or plan.has_shortcut(site.number):
                width = plan.widths[site.number]
                values, vectors = principal_components(covariance)
                spectra.append(values)
                matrices.append(vectors[:, :width].clone(memory_format=torch.contiguous_format))
                deleted = vectors[:, width:].to(model.dtype) if each_its_own else None
            else:
                unfinished.append(covariance)
            stream.advance(site, deleted)
    stream_range.warn()
    return Bases(plan, matrices, torch.stack(list(spectra)), stream.tokens)


def _add_covariance_(
    covariance: Tensor, stream: Stream, site: Site, plan: SlicePlan, stream_range: StreamRange
) -> None:
    """Add the covariance of the plan's signal at a site to ``covariance`` [D, D]."""
    for states, mask in stream.batches():
        rows = states.flatten(0, 1)
        stream_range.see(rows, site.norm_path)
        normalized = plan.signal == "normalized"
        scale = rstd(rows, plan.full_width, norm_eps(site.norm)).squeeze(1) if normalized else None
        covariance_(covariance, rows, scale, mask)
    if not covariance.diagonal().isfinite().all():
        raise InputError(
            f"the activations entering {site.norm_path} are not finite in {states.dtype}: check the weights, or load "
            "the model in a wider dtype."
        )


@torch.no_grad()
def refit_readers(
    model: PreTrainedModel,
    calibration: Iterable[Batch],
    bases: Bases,
    *,
    storage: Storage = IN_MEMORY,
    progress: bool = True,
) -> Bases:
    """Re-fit what the readers make of the sliced stream to what they read in the dense model.

    At each site, with X [N, d] the sliced model's normalised stream in its basis and Y [N, D] the dense model's, the
    readers' input map becomes the damped least-squares solution

        M = argmin |X M - Y|^2 + lambda |M - Q^T|^2 = (X^T X + lambda I)^-1 (X^T Y + lambda Q^T)

    instead of ``Q^T``; what the slice deleted is thereby estimated from what it kept. The sites are taken in order, so
    that X holds the effect of the maps before it.

    Args: as :func:`find_bases`, with the bases it returned for the same calibration.
    """
    decoder, plan = Decoder(model), bases.plan
    readers, sliced = storage.tensors("readers"), storage.states("sliced")
    with evaluating(model):
        stream = enter(decoder, calibration, storage, at_least=max(plan.widths))
        if not sliced:
            sliced.extend(stream.states)
        for site in visit(decoder, storage, "re-fitting", progress=progress):
            basis = bases.basis(site.number)
            factor = basis.to(model.dtype)
            fitted = _fit(stream, sliced, site, basis, factor)
            readers.append(fitted.T.contiguous())
            _advance_sliced(stream, sliced, site, factor, fitted.to(model.dtype))
            stream.advance(site)
    return replace(bases, readers=readers)


def _fit(stream: Stream, sliced: MutableSequence[Tensor], site: Site, basis: Tensor, factor: Tensor) -> Tensor:
    """Multiply the sliced model's states by ``factor``, and return the map M [d, D] of the site's readers.

    Args:
        stream: the dense model's.
        sliced: the sliced model's, one [B, T, D] tensor per batch.
        site: where both have arrived.
        basis: Q [D, d] in fp64.
        factor: Q in the dtype of the states.
    """
    (full, width), eps = basis.shape, norm_eps(site.norm)
    gram = _square(width, basis.device)
    cross = torch.zeros(width, full, dtype=torch.float64, device=basis.device)
    for index, (dense, mask) in enumerate(stream.batches()):
        narrow = without_mean(sliced[index]) if stream.architecture.centered else sliced[index]
        narrow = sliced[index] = narrow @ factor
        x = (narrow * rstd(narrow, full, eps)).flatten(0, 1)
        y = (dense * rstd(dense, full, eps)).flatten(0, 1)
        if mask is not None:
            x, y = x[mask], y[mask]
        gram += x.T @ x  # fp32 within a batch: the damping is far above its rounding
        cross += x.T @ y
    damping = REFIT_DAMPING * gram.diagonal().mean()
    gram.diagonal().add_(damping)
    return torch.linalg.solve(gram, cross + damping * basis.T)


def _advance_sliced(stream: Stream, sliced: MutableSequence[Tensor], site: Site, basis: Tensor, fitted: Tensor) -> None:
    """Bring the sliced model's states [B, T, d], in ``basis`` [D, d], to the next site, where they are [B, T, D]."""
    if site.sublayer is None:
        return
    for index in range(len(sliced)):
        narrow = sliced[index]
        estimate = (narrow * rstd(narrow, len(basis), norm_eps(site.norm))).to(narrow.dtype) @ fitted
        norms = {branch.norm: at(site.part, branch.norm) for branch in site.sublayer.branches}
        gains = {path: stream.architecture.gain(norm) for path, norm in norms.items()}
        normalised = {path: _affine(norm, gains[path], estimate) for path, norm in norms.items()}
        sliced[index] = narrow @ basis.T + stream.output(site, index, normalised)


def align(bases: Bases, *, storage: Storage = IN_MEMORY) -> Bases:
    """Rotate each basis inside its span so that shortcuts become the identity minus a low rank.

    With ``Q^T Q' = U S V^T`` the next basis becomes ``Q' V U^T`` (``U`` extended by the identity where the stream
    widens): the same span, hence the same model, and the shortcut ``U S U^T = I - U (I - S) U^T``, padded with zeros.
    """
    plan = bases.plan
    matrices, readers = storage.tensors("matrices"), storage.tensors("readers")
    for group in storage.steps(len(bases.matrices)):
        matrix, turn = bases.matrices[group], None
        first = plan.groups.index(group)
        if first > 0 and plan.rank(first - 1) is not None:
            left, _, right = torch.linalg.svd(matrices[group - 1].T @ matrix, full_matrices=True)
            width = plan.widths[first - 1]
            turn = right.T.clone()
            turn[:, :width] = right.T[:, :width] @ left.T
        matrices.append(matrix if turn is None else matrix @ turn)
        for site in range(first, first + plan.groups.count(group) if bases.readers else first):
            readers.append(bases.readers[site] if turn is None else bases.readers[site] @ turn)
    return replace(bases, matrices=matrices, readers=readers)


def _affine(norm: Any, gain: Tensor | None, normalised: Tensor) -> Tensor:
    """The last step of a norm: its gain and, for a LayerNorm, its bias."""
    weighted = normalised if gain is None else normalised * gain
    return weighted if getattr(norm, "bias", None) is None else weighted + norm.bias


def _square(size: int, device: torch.device) -> Tensor:
    return torch.zeros(size, size, dtype=torch.float64, device=device)
