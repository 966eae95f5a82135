"""Turn a dense model into a sliced one: fold the norms' weights, rotate into the bases, keep the leading directions."""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from slicegpt_fast.architectures import Decoder, Weight, at, embedding_scale, weights
from slicegpt_fast.slicing.bases import Bases
from slicegpt_fast.slicing.format import SliceConfig
from slicegpt_fast.slicing.integration import mark_sliced
from slicegpt_fast.slicing.layers import MappedEmbedding, MappedNorm, copy_rest_, empty_copy, narrow_, shortcut_name
from slicegpt_fast.slicing.plan import check_plan
from slicegpt_fast.slicing.range import check_range


@torch.inference_mode(False)  # its weights could not be trained
def apply_bases(model: PreTrainedModel, bases: Bases, *, progress: bool = True) -> PreTrainedModel:
    """Return a sliced copy of the dense ``model``; the dense model is left as it was.

    With ``Q`` the basis of a linear layer's site, ``Q'`` that of the site after it and ``gamma`` its norm's weight:
    readers become ``W diag(gamma) Q``, writers ``Q'^T W`` and ``Q'^T b``, shortcuts ``Q^T Q'``, the embedding ``E Q``.
    Where the plan keeps the head tied to the embedding, E stays, with maps ``Q``, which takes in the factor of a scaled
    embedding, behind it and ``diag(gamma) Q`` with the bias ``beta`` before the head.
    A LayerNorm subtracts the mean of the stream: there, writers and embeddings take ``Q - mean(Q)`` and leave it none.

    Raises:
        InputError: the bases belong to a model of another size.
    """
    dense = Decoder(model)
    sliced = outline(dense, bases)
    for _, rotate in tqdm(rotations(dense, sliced, bases), desc="slicing", unit="part", disable=not progress):
        rotate()
    return sliced.model


def outline(dense: Decoder, bases: Bases) -> Decoder:
    """Return a copy of a dense model in the shape that ``bases`` give it, with all parameters on the meta device."""
    check_plan(bases.plan, dense)
    sliced = empty_copy(dense.model)
    narrow_(sliced, bases.plan)
    mark_sliced(sliced, dense.model, SliceConfig.from_bases(bases))
    return Decoder(sliced)


def parts(decoder: Decoder) -> list[tuple[str, ...]]:
    """Return the parts that a model is rotated in, as paths of submodules: embeddings, each decoder layer, head."""
    layers = [(decoder.layer_path(index),) for index in range(len(decoder.layers))]
    return [tuple(decoder.embeddings), *layers, (decoder.sites[-1].path, decoder.head_path)]


def rotations(dense: Decoder, sliced: Decoder, bases: Bases) -> list[tuple[tuple[str, ...], Callable[[], None]]]:
    """Return the parts of a model, each with the call that fills it in the outline ``sliced``."""
    architecture = dense.architecture

    def writing(site: int) -> Tensor:
        basis = bases.basis(site)
        return basis - basis.mean(0) if architecture.centered else basis

    @torch.no_grad()
    def rotate_embeddings() -> None:
        for path, embeddings in dense.embeddings.items():
            target, table = sliced.embeddings[path], _exact(embeddings.weight)
            if isinstance(target, MappedEmbedding):
                Weight(target.map).matrix = writing(0).T * embedding_scale(embeddings)
                copy_rest_(target, embeddings)
            else:
                Weight(target).matrix = table @ writing(0).to(table)

    @torch.no_grad()
    def rotate_layer(index: int) -> None:
        layer, narrow = dense.layers[index], sliced.layers[index]
        for site, sublayer in enumerate(architecture.sublayers, index * len(architecture.sublayers)):
            reader, writer = bases.reader(site), writing(site + 1)
            for branch in sublayer.branches:
                norm = at(layer, branch.norm)
                gain = architecture.gain(norm)
                for source, target in zip(weights(layer, branch.readers), weights(narrow, branch.readers), strict=True):
                    _rotate_reader_(target, source, norm, gain, reader)
                for source, target in zip(weights(layer, branch.writers), weights(narrow, branch.writers), strict=True):
                    _rotate_writer_(target, source, writer)
            if bases.plan.has_shortcut(site):
                _fill_shortcut_(at(narrow, shortcut_name(sublayer)), bases.basis(site), bases.basis(site + 1))
        copy_rest_(narrow, layer)

    @torch.no_grad()
    def rotate_head() -> None:
        reader, norm = bases.reader(dense.sites[-1].number), cast(Any, dense.final_norm)
        gain = architecture.gain(norm)
        if isinstance(sliced.final_norm, MappedNorm):
            target = Weight(sliced.final_norm.map)
            target.matrix = reader if gain is None else reader * gain.to(reader)[:, None]
            if target.bias is not None:
                target.bias = norm.bias.clone()
            sliced.model.tie_weights()
        else:
            _rotate_reader_(Weight(sliced.head), Weight(dense.head), norm, gain, reader)
        copy_rest_(sliced.head, dense.head)

    layer_calls = [partial(rotate_layer, index) for index in range(len(dense.layers))]
    calls: list[Callable[[], None]] = [rotate_embeddings, *layer_calls, rotate_head]
    return [
        (paths, partial(_rotate_checked, rotate, sliced.model, paths))
        for paths, rotate in zip(parts(dense), calls, strict=True)
    ]


def _rotate_checked(rotate: Callable[[], None], sliced: PreTrainedModel, paths: tuple[str, ...]) -> None:
    rotate()
    check_range(sliced, paths)


def _exact(weight: Tensor) -> Tensor:
    """``weight`` in the precision it is rotated in: fp64, or fp32 for 16-bit weights; the result is rounded once."""
    return weight.to(torch.float32 if weight.element_size() == 2 else torch.float64)


def _rotate_reader_(target: Weight, source: Weight, norm: Any, gain: Tensor | None, basis: Tensor) -> None:
    """``W diag(gamma) Q`` with the norm's gain gamma, and for a norm with a bias beta ``b + W beta``."""
    matrix = _exact(source.matrix)
    beta = getattr(norm, "bias", None)
    if beta is not None:
        folded = matrix @ beta.to(matrix)
        target.bias = folded if source.bias is None else folded + source.bias
    if gain is not None:
        matrix = matrix * gain.to(matrix)
    target.matrix = matrix @ basis.to(matrix)


def _rotate_writer_(target: Weight, source: Weight, basis: Tensor) -> None:
    """``Q^T W`` and ``Q^T b``."""
    matrix = _exact(source.matrix)
    basis = basis.to(matrix)
    target.matrix = basis.T @ matrix
    if source.bias is not None:
        target.bias = basis.T @ source.bias.to(matrix)


def _fill_shortcut_(shortcut: Any, basis: Tensor, following: Tensor) -> None:
    """``Q^T Q'``, dense, or as the identity minus the leading eigenvectors of what it lacks of the identity."""
    if isinstance(shortcut, nn.Linear):
        Weight(shortcut).matrix = following.T @ basis
    elif shortcut.down is not None:
        product = basis.T @ following[:, : basis.shape[1]]
        identity = torch.eye(len(product), dtype=product.dtype, device=product.device)
        values, vectors = torch.linalg.eigh(identity - (product + product.T) / 2)
        rank = shortcut.down.out_features
        Weight(shortcut.down).matrix = vectors[:, -rank:].T
        Weight(shortcut.up).matrix = vectors[:, -rank:] * values[-rank:]
