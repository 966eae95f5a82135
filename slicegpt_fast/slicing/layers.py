"""The shape of a sliced model: weightless norms, narrow linear layers, shortcuts on the residual path."""

from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from slicegpt_fast.architectures import Sublayer, architecture_of, at
from slicegpt_fast.slicing.plan import SlicePlan


class WeightlessRMSNorm(nn.Module):
    """``norm(h) = h / sqrt(sum(h^2) / D + eps)`` over the kept width d <= D; its weight is folded into the readers.

    The divisor is the full width D: deleted directions count as zeros, so a rotated stream of any width is scaled as
    the dense model scales it.
    """

    def __init__(self, full_width: int, eps: float) -> None:
        super().__init__()
        self.full_width = full_width
        self.eps = eps

    def forward(self, hidden_states: Tensor) -> Tensor:  # [..., d] -> [..., d]
        return (hidden_states * rstd(hidden_states, self.full_width, self.eps)).to(hidden_states.dtype)

    def extra_repr(self) -> str:
        return f"full_width={self.full_width}, eps={self.eps}"


def rstd(hidden_states: Tensor, full_width: int, eps: float) -> Tensor:
    """The weightless norm's row scale in fp32: [..., d] -> [..., 1]."""
    return torch.rsqrt(hidden_states.float().square().sum(-1, keepdim=True) / full_width + eps)


def branch(layer: nn.Module, sublayer: Sublayer, hidden_states: Tensor, **layer_arguments: Any) -> Tensor:
    """One residual branch without its addition, ``module(norm(h))``: [B, T, D] -> [B, T, D]."""
    normalised = at(layer, sublayer.norm)(hidden_states)
    output = at(layer, sublayer.module)(normalised, **layer_arguments if sublayer.takes_layer_arguments else {})
    return output[0] if isinstance(output, tuple) else output


def shortcut_name(sublayer: Sublayer) -> str:
    """The name of the shortcut that the stream passes beside ``sublayer``, an ``nn.Linear`` of the decoder layer."""
    return f"{sublayer.module}_shortcut"


def forward_with_shortcuts(layer: nn.Module, hidden_states: Tensor, **layer_arguments: Any) -> Tensor:
    """A decoder layer's forward where every residual path has a shortcut: ``h <- shortcut(h) + module(norm(h))``."""
    for sublayer in cast(tuple[Sublayer, ...], layer.sublayers):
        output = branch(layer, sublayer, hidden_states, **layer_arguments)
        hidden_states = at(layer, shortcut_name(sublayer))(hidden_states) + output
    return hidden_states


def narrow_(model: PreTrainedModel, plan: SlicePlan) -> None:
    """Give ``model`` the modules and shapes of ``plan``; every new parameter is on the meta device, to be filled."""
    architecture = architecture_of(model)
    eps = getattr(model.config, architecture.norm_eps)
    embeddings = at(model, architecture.embeddings)
    embeddings.embedding_dim = plan.widths[0]
    embeddings.weight = _meta_like(embeddings.weight, embeddings.num_embeddings, plan.widths[0])
    for site, (_, layer, sublayer) in enumerate(architecture.sites(model)):
        width, following = plan.widths[site], plan.widths[site + 1]
        layer.set_submodule(sublayer.norm, WeightlessRMSNorm(plan.full_width, eps))
        for reader in sublayer.readers:
            _resize_(at(layer, reader), in_features=width)
        writer = at(layer, sublayer.writer)
        _resize_(writer, out_features=following)
        if plan.has_shortcut(site):
            shortcut = nn.Linear(width, following, bias=False, device="meta", dtype=writer.weight.dtype)
            layer.add_module(shortcut_name(sublayer), shortcut.requires_grad_(writer.weight.requires_grad))
            layer.sublayers = architecture.sublayers  # type: ignore[assignment]
            layer.forward = MethodType(forward_with_shortcuts, layer)
    model.set_submodule(architecture.final_norm, WeightlessRMSNorm(plan.full_width, eps))
    _resize_(at(model, architecture.head), in_features=plan.widths[-1])
    model.config.tie_word_embeddings = False
    model.all_tied_weights_keys = {}


def _resize_(linear: nn.Linear, *, in_features: int | None = None, out_features: int | None = None) -> None:
    linear.in_features = in_features or linear.in_features
    linear.out_features = out_features or linear.out_features
    linear.weight = _meta_like(linear.weight, linear.out_features, linear.in_features)
    if linear.bias is not None and out_features:
        linear.bias = _meta_like(linear.bias, linear.out_features)


def _meta_like(parameter: Tensor, *shape: int) -> nn.Parameter:
    empty = torch.empty(shape, dtype=parameter.dtype, device="meta")
    return nn.Parameter(empty, requires_grad=parameter.requires_grad)
