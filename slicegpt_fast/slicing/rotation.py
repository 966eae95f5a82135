"""Turn a dense model into a sliced one: fold the norms' weights, rotate into the bases, keep the leading directions."""

import copy

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from slicegpt_fast.architectures import architecture_of, at
from slicegpt_fast.slicing.bases import Bases
from slicegpt_fast.slicing.format import SliceConfig
from slicegpt_fast.slicing.layers import narrow_, shortcut_name
from slicegpt_fast.slicing.plan import check_plan


@torch.no_grad()
def apply_bases(model: PreTrainedModel, bases: Bases, *, progress: bool = True) -> PreTrainedModel:
    """Return a sliced copy of the dense ``model``; the dense model is left as it was.

    With ``Q`` the basis of a linear layer's site, ``Q'`` that of the site after it and ``gamma`` its norm's weight:
    readers become ``W diag(gamma) Q``, writers ``Q'^T W`` and ``Q'^T b``, shortcuts ``Q^T Q'``, the embedding ``E Q``.

    Raises:
        InputError: the bases belong to a model of another size.
    """
    architecture = architecture_of(model)
    plan = bases.plan
    check_plan(plan, model)
    basis = [bases.matrices[group] for group in plan.groups]
    # New modules around the dense model's own parameters: no weight exists twice, each is replaced by its narrow form.
    sliced = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    narrow_(sliced, plan)
    sliced.config.quantization_config = SliceConfig.from_bases(bases)

    embeddings = at(model, architecture.embeddings)
    _fill(at(sliced, architecture.embeddings), "weight", _rotated(embeddings.weight, right=basis[0]))
    pairs = zip(architecture.sites(model), architecture.sites(sliced), strict=True)
    bar = tqdm(pairs, total=len(basis) - 1, desc="slicing", unit="site", disable=not progress)
    for site, ((_, dense, sublayer), (_, narrow, _)) in enumerate(bar):
        here, following = basis[site], basis[site + 1]
        gamma = at(dense, sublayer.norm).weight
        for path in sublayer.readers:
            weight = at(dense, path).weight
            _fill(at(narrow, path), "weight", _rotated(weight, gamma=gamma, right=here))
        writer = at(dense, sublayer.writer)
        for name, parameter in writer.named_parameters():
            _fill(at(narrow, sublayer.writer), name, _rotated(parameter, left=following.T))
        if plan.has_shortcut(site):
            _fill(at(narrow, shortcut_name(sublayer)), "weight", following.T @ here)
    gamma = at(model, architecture.final_norm).weight
    head = at(model, architecture.head)
    _fill(at(sliced, architecture.head), "weight", _rotated(head.weight, gamma=gamma, right=basis[-1]))
    _unshare_(sliced, model)
    return sliced


def _rotated(
    weight: Tensor, *, gamma: Tensor | None = None, right: Tensor | None = None, left: Tensor | None = None
) -> Tensor:
    """``left @ weight @ diag(gamma) @ right``, the factors that are given, in fp64 (fp32 for 16-bit weights)."""
    dtype = torch.float32 if weight.element_size() == 2 else torch.float64
    product = weight.to(dtype)
    if gamma is not None:
        product = product * gamma.to(dtype)
    if right is not None:
        product = product @ right.to(product)
    return product if left is None else left.to(product) @ product


def _fill(module: nn.Module, name: str, value: Tensor) -> None:
    """Give a parameter that :func:`narrow_` left on the meta device its value, rounded once to its dtype."""
    empty = module.get_parameter(name)
    filled = value.to(empty.dtype).contiguous()
    module.register_parameter(name, nn.Parameter(filled, requires_grad=empty.requires_grad))


def _unshare_(sliced: nn.Module, model: nn.Module) -> None:
    """Copy the parameters that slicing leaves alone, so that the two models share nothing."""
    dense = {id(parameter) for parameter in model.parameters()}
    for module in sliced.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in dense:
                copied = nn.Parameter(parameter.clone(), requires_grad=parameter.requires_grad)
                module.register_parameter(name, copied)
