"""Turn a dense model into a sliced one: fold the norms' weights, rotate into the bases, keep the leading directions."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from slicegpt_fast.architectures import Weight, architecture_of, at, weights
from slicegpt_fast.slicing.bases import Bases
from slicegpt_fast.slicing.format import SliceConfig
from slicegpt_fast.slicing.layers import narrow_, shortcut_name
from slicegpt_fast.slicing.plan import check_plan


@torch.no_grad()
def apply_bases(model: PreTrainedModel, bases: Bases, *, progress: bool = True) -> PreTrainedModel:
    """Return a sliced copy of the dense ``model``; the dense model is left as it was.

    With ``Q`` the basis of a linear layer's site, ``Q'`` that of the site after it and ``gamma`` its norm's weight:
    readers become ``W diag(gamma) Q``, writers ``Q'^T W`` and ``Q'^T b``, shortcuts ``Q^T Q'``, the embedding ``E Q``.
    A LayerNorm subtracts the mean of the stream: there, writers and embeddings take ``Q - mean(Q)`` and leave it none.

    Raises:
        InputError: the bases belong to a model of another size.
    """
    architecture = architecture_of(model)
    plan = bases.plan
    check_plan(plan, model)
    basis = [bases.matrices[group] for group in plan.groups]
    writing = [matrix - matrix.mean(0) for matrix in basis] if architecture.centered else basis
    # New modules around the dense model's own parameters: no weight exists twice, each is replaced by its narrow form.
    sliced = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    narrow_(sliced, plan)
    sliced.config.quantization_config = SliceConfig.from_bases(bases)

    for path in architecture.embeddings:
        table = at(model, path).weight
        Weight(at(sliced, path)).matrix = _exact(table) @ writing[0].to(_exact(table))
    pairs = zip(architecture.sites(model), architecture.sites(sliced), strict=True)
    bar = tqdm(pairs, total=len(basis) - 1, desc="slicing", unit="site", disable=not progress)
    for site, ((_, dense, sublayer), (_, narrow, _)) in enumerate(bar):
        for branch in sublayer.branches:
            norm = at(dense, branch.norm)
            for source, target in zip(weights(dense, branch.readers), weights(narrow, branch.readers), strict=True):
                _rotate_reader_(target, source, norm, bases.readers[site])
            for source, target in zip(weights(dense, branch.writers), weights(narrow, branch.writers), strict=True):
                _rotate_writer_(target, source, writing[site + 1])
        if plan.has_shortcut(site):
            _fill_shortcut_(at(narrow, shortcut_name(sublayer)), basis[site], basis[site + 1])
    head, narrow_head = Weight(model.get_output_embeddings()), Weight(sliced.get_output_embeddings())
    _rotate_reader_(narrow_head, head, at(model, architecture.final_norm), bases.readers[-1])
    _unshare_(sliced, model)
    return sliced


def _exact(weight: Tensor) -> Tensor:
    """``weight`` in the precision it is rotated in: fp64, or fp32 for 16-bit weights; the result is rounded once."""
    return weight.to(torch.float32 if weight.element_size() == 2 else torch.float64)


def _rotate_reader_(target: Weight, source: Weight, norm: Any, basis: Tensor) -> None:
    """``W diag(gamma) Q``, and for a norm with a bias beta ``b + W beta``."""
    matrix = _exact(source.matrix)
    beta = getattr(norm, "bias", None)
    if beta is not None:
        folded = matrix @ beta.to(matrix)
        target.bias = folded if source.bias is None else folded + source.bias
    if norm.weight is not None:
        matrix = matrix * norm.weight.to(matrix)
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
        values, vectors = torch.linalg.eigh(torch.eye(len(product)).to(product) - (product + product.T) / 2)
        rank = shortcut.down.out_features
        Weight(shortcut.down).matrix = vectors[:, -rank:].T
        Weight(shortcut.up).matrix = vectors[:, -rank:] * values[-rank:]


def _unshare_(sliced: nn.Module, model: nn.Module) -> None:
    """Copy the parameters that slicing leaves alone, so that the two models share nothing."""
    dense = {id(parameter) for parameter in model.parameters()}
    for module in sliced.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in dense:
                copied = nn.Parameter(parameter.clone(), requires_grad=parameter.requires_grad)
                module.register_parameter(name, copied)
