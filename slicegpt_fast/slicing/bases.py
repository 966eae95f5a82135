"""Find the bases of a plan: run the calibration tokens through the dense model, layer by layer, and take the PCA.

Slicing a site means projecting the stream onto the span of its basis, so the effect of a slice on everything after it
is had from the dense model with ``h <- h Q Q^T`` at that site. Where every site has its own basis, each is put to use
as soon as it is known: later bases are fitted to what the sliced model will really see, as in the published algorithm.
Bases that several sites share are fitted to the dense model's stream.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from slicegpt_fast.architectures import architecture_of, at, evaluating
from slicegpt_fast.errors import InputError
from slicegpt_fast.ops.covariance import covariance_
from slicegpt_fast.slicing.layers import norm_eps, normalise, rstd, run_branches
from slicegpt_fast.slicing.plan import SlicePlan
from slicegpt_fast.slicing.range import StreamRange
from slicegpt_fast.slicing.storage import IN_MEMORY, Storage
from slicegpt_fast.slicing.walk import Batch, enter, visit

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
    centered, full = architecture_of(model).centered, plan.full_width
    each_its_own = len(set(plan.groups)) == len(plan.groups)
    spectra, matrices = storage.tensors("spectra"), storage.tensors("matrices")
    unfinished = storage.tensors("covariance")  # of the sites so far, where the next one shares their basis
    with evaluating(model):
        stream = enter(model, calibration, storage, at_least=max(plan.widths))
        stream_range = StreamRange(model.dtype)
        for stop in visit(model, storage, "calibrating", progress=progress):
            if unfinished:
                covariance = unfinished.pop()
            else:
                covariance = torch.zeros(full, full, dtype=torch.float64, device=stream.device)
            for i, mask in enumerate(stream.counted):
                state = stream.states[i]
                if centered:
                    state = stream.states[i] = _centred(state)
                rows = state.flatten(0, 1)
                stream_range.see(rows, stop.path)
                scale = rstd(rows, full, norm_eps(stop.norm)).squeeze(1) if plan.signal == "normalized" else None
                covariance_(covariance, rows, scale, mask)
            if not covariance.diagonal().isfinite().all():
                raise InputError(
                    f"the activations entering {stop.path} are not finite in {model.dtype}: check the weights, or load "
                    "the model in a wider dtype."
                )
            if stop.sublayer is None or plan.has_shortcut(stop.site):
                values, vectors = principal_components(covariance)
                spectra.append(values)
                matrices.append(vectors[:, : plan.widths[stop.site]].clone(memory_format=torch.contiguous_format))
                deleted = vectors[:, plan.widths[stop.site] :].to(model.dtype)
            else:
                unfinished.append(covariance)
            if stop.layer is None or stop.sublayer is None:
                continue
            for i, arguments in enumerate(stream.layer_arguments):
                state = stream.states[i]
                if each_its_own:
                    state = state - state @ deleted @ deleted.T
                normalised = normalise(stop.layer, stop.sublayer, state)
                output, _ = run_branches(stop.layer, stop.sublayer, normalised, **arguments[stop.index])
                stream.states[i] = state + output
    stream_range.warn()
    return Bases(plan, matrices, torch.stack(list(spectra)), stream.tokens)


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
    plan, centered, full = bases.plan, architecture_of(model).centered, bases.plan.full_width
    readers, sliced = storage.tensors("readers"), storage.states("sliced")
    with evaluating(model):
        stream = enter(model, calibration, storage, at_least=max(plan.widths))
        if not sliced:
            sliced.extend(stream.states)
        for stop in visit(model, storage, "re-fitting", progress=progress):
            basis = bases.basis(stop.site)
            eps, factor = norm_eps(stop.norm), basis.to(model.dtype)
            gram = torch.zeros(len(basis.T), len(basis.T), dtype=torch.float64, device=basis.device)
            cross = torch.zeros(len(basis.T), full, dtype=torch.float64, device=basis.device)
            for i, mask in enumerate(stream.counted):
                dense, narrow = stream.states[i], sliced[i]
                if centered:
                    dense = stream.states[i] = _centred(dense)
                    narrow = _centred(narrow)
                narrow = sliced[i] = narrow @ factor
                x = (narrow * rstd(narrow, full, eps)).flatten(0, 1)
                y = (dense * rstd(dense, full, eps)).flatten(0, 1)
                if mask is not None:
                    x, y = x[mask], y[mask]
                gram += x.T @ x  # fp32 within a batch: the damping is far above its rounding
                cross += x.T @ y
            damping = REFIT_DAMPING * gram.diagonal().mean()
            gram.diagonal().add_(damping)
            fitted = torch.linalg.solve(gram, cross + damping * basis.T)
            readers.append(fitted.T.contiguous())
            if stop.layer is None or stop.sublayer is None:
                continue
            fitted = fitted.to(model.dtype)
            for i, arguments in enumerate(stream.layer_arguments):
                dense, narrow = stream.states[i], sliced[i]
                normalised = normalise(stop.layer, stop.sublayer, dense)
                output, _ = run_branches(stop.layer, stop.sublayer, normalised, **arguments[stop.index])
                stream.states[i] = dense + output
                estimate = (narrow * rstd(narrow, full, eps)).to(model.dtype) @ fitted
                normalised = {norm: _affine(at(stop.layer, norm), estimate) for norm in normalised}
                output, _ = run_branches(stop.layer, stop.sublayer, normalised, **arguments[stop.index])
                sliced[i] = narrow @ factor.T + output
    return replace(bases, readers=readers)


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


def _affine(norm: Any, normalised: Tensor) -> Tensor:
    """The last step of a norm: its weight and, for a LayerNorm, its bias."""
    weighted = normalised if norm.weight is None else normalised * norm.weight
    return weighted if getattr(norm, "bias", None) is None else weighted + norm.bias


def _centred(stream: Tensor) -> Tensor:
    return stream - stream.mean(-1, keepdim=True)
