"""The shape of a sliced model: weightless norms, narrow linear layers, shortcuts on the residual path."""

import copy
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from slicegpt_fast.architectures import Architecture, Branch, Decoder, Sublayer, Weight, at, weights
from slicegpt_fast.errors import InputError
from slicegpt_fast.slicing.cuts.narrow import narrow_layers_
from slicegpt_fast.slicing.plan import SlicePlan

IN_FEATURES = ("in_features", "nx", "hidden_dim")  # what nn.Linear, Conv1D, routers and experts call their sizes
OUT_FEATURES = ("out_features", "nf")


class WeightlessNorm(nn.Module):
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

    def __deepcopy__(self, memo: dict[int, Any]) -> "WeightlessNorm":
        """Copy the norm with the model around it; alone it is copied by adapters that want to train the copy.

        Raises:
            InputError: it is copied alone.
        """
        if not memo:
            raise InputError(
                "the norms of a sliced model have no weight to train, it is folded into the linear layers that read "
                "them: adapt those (LoRA), not the norms (LNTuning, modules_to_save)."
            )
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return copied

    def extra_repr(self) -> str:
        return f"full_width={self.full_width}, eps={self.eps}"


class MappedNorm(WeightlessNorm):
    """A final norm before a head that is the embedding table: ``norm(h) M^T [+ b]`` of the dense width D.

    The map M [D, d] holds what a narrow head would have folded into it.
    """

    def __init__(self, width: int, full_width: int, eps: float, *, bias: bool, **factory: Any) -> None:
        super().__init__(full_width, eps)
        self.map = nn.Linear(width, full_width, bias=bias, **factory)

    def forward(self, hidden_states: Tensor) -> Tensor:  # [..., d] -> [..., D]
        return cast(Tensor, self.map(super().forward(hidden_states)))


class MappedEmbedding(nn.Embedding):
    """A table of the dense width D, which the head shares, and the map of its rows to the stream: ``E[ids] M^T``."""

    def __init__(self, table: nn.Embedding, width: int, **factory: Any) -> None:
        super().__init__(table.num_embeddings, table.embedding_dim, table.padding_idx, _weight=table.weight)
        self.weight = table.weight
        self.embedding_dim = width  # of what it returns, which adapters add to
        self.map = nn.Linear(table.embedding_dim, width, bias=False, **factory)

    def forward(self, ids: Tensor) -> Tensor:  # [...] -> [..., d]
        return cast(Tensor, self.map(super().forward(ids)))


class AlignedShortcut(nn.Module):
    """The identity minus a low rank, ``h - up(down(h))``, on a stream that keeps its width or widens by zeros."""

    def __init__(self, width: int, following: int, rank: int, **factory: Any) -> None:
        super().__init__()
        self.padding = following - width
        self.down = nn.Linear(width, rank, bias=False, **factory) if rank else None
        self.up = nn.Linear(rank, width, bias=False, **factory) if rank else None

    def forward(self, hidden_states: Tensor) -> Tensor:  # [..., d] -> [..., d']
        if self.down is not None and self.up is not None:
            hidden_states = hidden_states - self.up(self.down(hidden_states))
        return nn.functional.pad(hidden_states, (0, self.padding))

    def extra_repr(self) -> str:
        return f"padding={self.padding}"


def rstd(hidden_states: Tensor, full_width: int, eps: float) -> Tensor:
    """The weightless norm's row scale in fp32: [..., d] -> [..., 1]."""
    return torch.rsqrt(hidden_states.float().square().sum(-1, keepdim=True) / full_width + eps)


def norm_eps(norm: nn.Module) -> float:
    """The epsilon of a family's norm, or of the weightless one."""
    return cast(float, norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps)


def call_first(module: nn.Module, branch: Branch, normalised: Tensor, layer_arguments: dict[str, Any]) -> Any:
    """The first module of a branch on x [B, T, d], called as the family calls it."""
    if not branch.takes_layer_arguments:
        return module(normalised)
    named = {name: value for name, value in layer_arguments.items() if name not in branch.withheld}
    if branch.keyword is None:
        return module(normalised, **named)
    return module(**{branch.keyword: normalised}, **named)


def run_branch(layer: nn.Module, branch: Branch, normalised: Tensor, **layer_arguments: Any) -> tuple[Tensor, Any]:
    """``module(x)`` of one branch, and the attention weights where it attends: x [B, T, d] -> [B, T, d']."""
    first, *others = branch.modules
    output = call_first(at(layer, first), branch, normalised, layer_arguments)
    output, attention_weights = output[:2] if isinstance(output, tuple) else (output, None)
    for path in others:
        output = at(layer, path)(output)
    if branch.multiplier is not None:
        output = output * getattr(layer, branch.multiplier)
    return output, attention_weights


def normalise(layer: nn.Module, sublayer: Sublayer, hidden_states: Tensor) -> dict[str, Tensor]:
    """The stream [B, T, d] through each norm of a sublayer, by the norm's path."""
    return {norm: at(layer, norm)(hidden_states) for norm in dict.fromkeys(b.norm for b in sublayer.branches)}


def run_branches(
    layer: nn.Module, sublayer: Sublayer, normalised: dict[str, Tensor], **layer_arguments: Any
) -> tuple[Tensor, Any]:
    """What a sublayer makes of the normalised stream and adds to it, [B, T, d'], and its attention weights."""
    first, *others = (run_branch(layer, b, normalised[b.norm], **layer_arguments) for b in sublayer.branches)
    return sum((output for output, _ in others), first[0]), first[1]


def run_sublayer(
    layer: nn.Module, sublayer: Sublayer, hidden_states: Tensor, **layer_arguments: Any
) -> tuple[Tensor, Any]:
    """``shortcut(h) + module(norm(h))``, [B, T, d] -> [B, T, d'], and the attention weights."""
    normalised = normalise(layer, sublayer, hidden_states)
    output, attention_weights = run_branches(layer, sublayer, normalised, **layer_arguments)
    shortcut = getattr(layer, shortcut_name(sublayer), None)
    return output + (hidden_states if shortcut is None else shortcut(hidden_states)), attention_weights


def shortcut_name(sublayer: Sublayer) -> str:
    """The name of the module of a decoder layer that the stream passes beside ``sublayer``."""
    return f"{sublayer.name}_shortcut"


def forward_with_shortcuts(layer: nn.Module, hidden_states: Tensor, *positional: Any, **layer_arguments: Any) -> Any:
    """A decoder layer's forward with shortcuts on the residual path: ``h <- shortcut(h) + module(norm(h))``."""
    architecture = cast(Architecture, layer.architecture)
    layer_arguments.update(zip(architecture.positional, positional, strict=False))
    attention_weights = None
    for sublayer in architecture.sublayers:
        hidden_states, weights_here = run_sublayer(layer, sublayer, hidden_states, **layer_arguments)
        attention_weights = weights_here if attention_weights is None else attention_weights
    return (hidden_states, attention_weights) if architecture.returns_tuple else hidden_states


forward_with_shortcuts.__name__ = "forward"  # by which pickle finds a bound method again


@cache
def with_shortcuts(base: type[nn.Module], architecture: Architecture) -> type[nn.Module]:
    """Return the class of a family's decoder layers with shortcuts; it keeps its name, which others go by."""
    if hasattr(base, "architecture"):
        return base
    members = {"architecture": architecture, "forward": forward_with_shortcuts, "__reduce_ex__": reduce_with_shortcuts}
    return type(base.__name__, (base,), members)


def reduce_with_shortcuts(layer: nn.Module, protocol: int) -> tuple[Any, ...]:
    """Return how a decoder layer with shortcuts is copied and pickled: its class is in no module, but can be remade."""
    return new_with_shortcuts, (type(layer).__base__, layer.architecture), layer.__getstate__()


def new_with_shortcuts(base: type[nn.Module], architecture: Architecture) -> nn.Module:
    """Return an instance of :func:`with_shortcuts` without contents."""
    made = with_shortcuts(base, architecture)  # type: ignore[arg-type]
    return made.__new__(made)


def empty_copy(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy of ``model`` with all parameters on the meta device."""
    empty = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, empty)


def narrow_(model: PreTrainedModel, plan: SlicePlan) -> None:
    """Give ``model`` the modules and shapes of ``plan``; every new parameter is on the meta device, to be filled."""
    decoder = Decoder(model)
    narrow_layers_(decoder, plan.channels, plan.values)
    if plan.basis is None:
        return
    for path, embeddings in decoder.embeddings.items():
        if plan.tied and embeddings is model.get_input_embeddings():
            model.set_submodule(path, _mapped(MappedEmbedding, embeddings, embeddings, plan.widths[0]))
            continue
        embeddings.embedding_dim = plan.widths[0]
        Weight(embeddings).matrix = torch.empty(embeddings.num_embeddings, plan.widths[0], device="meta")
    for site, sublayer in decoder.sublayers():
        layer, width, following = site.part, plan.widths[site.number], plan.widths[site.number + 1]
        norms = {branch.norm: at(layer, branch.norm) for branch in sublayer.branches}
        for branch in sublayer.branches:
            for reader in weights(layer, branch.readers):
                _narrow_reader_(reader, norms[branch.norm], width)
            for writer in weights(layer, branch.writers):
                _narrow_writer_(writer, following)
        for path, norm in norms.items():
            layer.set_submodule(path, WeightlessNorm(plan.full_width, norm_eps(norm)))
        if plan.has_shortcut(site.number):
            rank, factory = plan.rank(site.number), {"device": "meta", "dtype": writer.matrix.dtype}
            shortcut: nn.Module = nn.Linear(width, following, bias=False, **factory)
            if rank is not None:
                shortcut = AlignedShortcut(width, following, rank, **factory)
            layer.add_module(shortcut_name(sublayer), shortcut.requires_grad_(writer.matrix.requires_grad))
            layer.__class__ = with_shortcuts(type(layer), decoder.architecture)  # type: ignore[arg-type]
    final = decoder.sites[-1]
    if plan.tied:
        bias, sizes = getattr(final.norm, "bias", None) is not None, (plan.widths[-1], plan.full_width)
        norm = _mapped(MappedNorm, decoder.head, *sizes, norm_eps(final.norm), bias=bias)
        model.set_submodule(final.path, norm)
        return
    _narrow_reader_(Weight(decoder.head), final.norm, plan.widths[-1])
    model.set_submodule(final.path, WeightlessNorm(plan.full_width, norm_eps(final.norm)))
    model.config.tie_word_embeddings = False
    model.all_tied_weights_keys = {}


def _mapped(made: type[nn.Module], like: nn.Module, *arguments: Any, **options: Any) -> nn.Module:
    """A norm or an embedding with a map on the meta device, of the dtype of ``like`` and trained as it is."""
    table = cast(Tensor, like.weight)
    module = made(*arguments, **options, device="meta", dtype=table.dtype)
    cast(nn.Module, module.map).requires_grad_(table.requires_grad)
    return module


def _narrow_reader_(reader: Weight, norm: nn.Module, width: int) -> None:
    rows = reader.matrix.shape[:-1]
    reader.matrix = torch.empty(*rows, width, device="meta")
    _set(reader.owner, IN_FEATURES, width)
    if getattr(norm, "bias", None) is not None:  # it is folded into the reader's bias, which may be new
        reader.bias = torch.empty(rows, device="meta")


def _narrow_writer_(writer: Weight, width: int) -> None:
    *experts, _, columns = writer.matrix.shape
    writer.matrix = torch.empty(*experts, width, columns, device="meta")
    _set(writer.owner, OUT_FEATURES, width)
    if writer.bias is not None:
        writer.bias = torch.empty(width, device="meta")


def _set(module: nn.Module, attributes: tuple[str, ...], size: int) -> None:
    for attribute in attributes:
        if hasattr(module, attribute):
            setattr(module, attribute, size)


def copy_rest_(narrow: nn.Module, dense: nn.Module) -> None:
    """Copy the parameters that slicing leaves alone: those that are still empty."""
    for path, module in narrow.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                copied = at(dense, path).get_parameter(name).detach().clone()
                module.register_parameter(name, nn.Parameter(copied, parameter.requires_grad))
