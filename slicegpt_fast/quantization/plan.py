"""How many bits the matrices of a model have, and which of its modules hold them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from slicegpt_fast.architectures import Branch, Decoder, Weight, at, weights
from slicegpt_fast.errors import InputError
from slicegpt_fast.ops.quantized import GROUPS
from slicegpt_fast.quantization.linear import Quantized, QuantizedEmbedding, QuantizedLinear

Bits = Literal[8, 4]
Group = Literal[32, 64, 128]
Tables = Literal[16, 8]
Method = Literal["gptq", "nearest"]
Rounded = tuple[Tensor, Tensor]  # the integers and scales of a matrix, as ``ops/quantized.py`` describes them


@dataclass(frozen=True)
class Precision:
    """What the matrices of a model are rounded to.

    Attributes:
        bits: of the linear layers in its decoder layers.
        group: columns that share a scale at 4 bits; None at 8, where a row has one.
        tables: bits of embedding table and head; 16 leaves them as they are.
        method: how they were rounded.

    Raises:
        InputError: one of them has another value than its type allows, or they do not belong together.
    """

    bits: Bits
    group: Group | None
    tables: Tables
    method: Method

    def __post_init__(self) -> None:
        for name, allowed in (("bits", Bits), ("tables", Tables), ("method", Method)):
            value, values = getattr(self, name), get_args(allowed)
            if isinstance(value, bool) or value not in values:
                raise InputError(f"{name} must be {' or '.join(map(repr, values))}, not {value!r}.")
        if self.group not in ((None,) if self.bits == 8 else GROUPS):
            wanted = "None, since a row has one scale," if self.bits == 8 else "32, 64 or 128"
            raise InputError(f"group must be {wanted} at {self.bits} bits, not {self.group!r}.")

    def __str__(self) -> str:
        groups = f" in groups of {self.group}" if self.group else ""
        return f"{self.bits} bits{groups}, tables {self.tables}, rounded by {self.method}"


def readers(layer: nn.Module, branch: Branch) -> dict[str, Weight]:
    """The readers of a branch that are to be rounded, by their path: its linear layers, but no router."""
    return _linears(layer, tuple(reader.path for reader in branch.inputs if reader.outputs != ("router",)))


def writers(layer: nn.Module, branch: Branch) -> dict[str, Weight]:
    """The writers of a branch that are to be rounded, by their path: its linear layers."""
    return _linears(layer, branch.writers)


def _linears(layer: nn.Module, paths: tuple[str, ...]) -> dict[str, Weight]:
    """The linear layers at those paths that ``layer`` has; stacked experts are none."""
    return {path: each for path in paths for each in weights(layer, (path,)) if each.name == "weight"}


def all_linears(decoder: Decoder) -> Iterator[tuple[nn.Module, str, Weight]]:
    """Yield every linear layer that is to be rounded, behind its decoder layer and its path there."""
    for site, sublayer in decoder.sublayers():
        for branch in sublayer.branches:
            for path, weight in (readers(site.part, branch) | writers(site.part, branch)).items():
                yield site.part, path, weight


def check_plain(decoder: Decoder) -> None:
    """Raise InputError unless what is to be rounded are plain linear layers of floating-point weights that are here."""
    for layer, path, weight in all_linears(decoder):
        cls = type(weight.owner)
        known = isinstance(weight.owner, nn.Linear | Conv1D) and cls.__module__.startswith(("torch.", "transformers."))
        matrix = weight.owner._parameters.get("weight") if known else None
        name = f"{path} of a {type(layer).__name__}"
        if type(matrix) is not nn.Parameter or not matrix.is_floating_point():
            raise InputError(
                f"{name} is a {cls.__module__}.{cls.__qualname__}, not a plain linear layer: quantise the model as "
                "from_pretrained loads it, with adapters merged."
            )
        if matrix.is_meta:
            raise InputError(f"{name} is on the meta device: load the model with its weights in memory.")


def replace_(parent: nn.Module, path: str, module: nn.Module) -> None:
    """Put ``module`` at a path in ``parent``, with the mode and the hooks of what stands there."""
    old = at(parent, path)
    if isinstance(module, Quantized):
        module.stands_for = type(old)
    module.train(old.training)
    module._forward_hooks, module._forward_pre_hooks = old._forward_hooks, old._forward_pre_hooks
    parent.set_submodule(path, module)


def replace_linear_(parent: nn.Module, path: str, rounded: Rounded) -> None:
    """Put a quantised linear layer in the place of one whose matrix was rounded, or is to be read from a file."""
    weight = Weight(at(parent, path))
    replace_(parent, path, QuantizedLinear(*rounded, weight.matrix.shape[1], weight.bias))


def replace_tables_(decoder: Decoder, rounded: Callable[[Tensor], Rounded], *, tied: bool) -> None:
    """Put a quantised embedding table and head into a model.

    A table with a map to a narrower stream stays, and so does a head that shares it.

    Args:
        decoder: of the model.
        rounded: makes integers and scales of a matrix.
        tied: the head is the embedding table.
    """
    model, table = decoder.model, cast(Any, decoder.model.get_input_embeddings())
    plain = type(table) is nn.Embedding
    if plain:
        (path,) = (path for path, module in decoder.embeddings.items() if module is table)
        factory = (table.embedding_dim, table.weight.dtype, table.padding_idx)
        replace_(model, path, QuantizedEmbedding(*rounded(table.weight), *factory))
    if not tied:
        replace_linear_(model, decoder.head_path, rounded(Weight(decoder.head).matrix))
    elif plain:
        shared = cast(Any, model.get_input_embeddings())
        replace_linear_(model, decoder.head_path, (shared.weight, shared.scales))
        name_ties_(model, "weight")


def name_ties_(model: Any, name: str) -> None:
    """Tell transformers which parameters a head and a quantised table share; their integers are called ``name``."""
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    if isinstance(table, QuantizedEmbedding) and model.all_tied_weights_keys:
        paths = {module: path for path, module in model.named_modules()}
        model._tied_weights_keys = {f"{paths[head]}.{each}": f"{paths[table]}.{each}" for each in (name, "scales")}
        model.all_tied_weights_keys = dict(model._tied_weights_keys)


def forget_ties_(model: Any) -> None:
    """Let the head and the table of a model, quantised no longer, share what those of its family share."""
    if vars(model).pop("_tied_weights_keys", None):
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
        model.tie_weights()


def quantized_modules(model: nn.Module) -> dict[str, Quantized]:
    """The modules of a model that hold a quantised matrix, by their path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, Quantized)}


def outline_(decoder: Decoder, precision: Precision) -> None:
    """Give a model on the meta device the modules of a quantised one."""
    tied = bool(decoder.model.all_tied_weights_keys)
    for layer, path, weight in [*all_linears(decoder)]:
        replace_linear_(layer, path, empty(weight.matrix, precision.bits, precision.group))
    if precision.tables == 8:
        replace_tables_(decoder, lambda matrix: empty(matrix, 8, None), tied=tied)


def name_parameters_(model: nn.Module, name: str) -> None:
    """Call the integers of all quantised matrices ``name``: STORED while a file is read, else "weight"."""
    for module in quantized_modules(model).values():
        module.rename_(name)
    name_ties_(model, name)


def empty(like: Tensor, bits: Bits, group: int | None) -> Rounded:
    """Integers and scales of a matrix [n, k] like another, on the meta device."""
    rows, width = like.shape
    columns, dtype = (width, torch.int8) if bits == 8 else (-(-width // 2), torch.uint8)
    scales = -(-width // (group or max(width, 1)))
    integers = torch.empty(rows, columns, dtype=dtype, device="meta")
    return integers, torch.empty(rows, scales, dtype=torch.float16, device="meta")
