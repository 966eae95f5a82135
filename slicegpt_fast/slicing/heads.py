"""Attention with values of a lower rank, under the attention code of transformers as it is.

That code gives queries, keys and values one head dim. With V/O rank r below it, the value projection stores r rows per
key-value head and the output projection r columns per head; in between, values are r numbers and zeros:

    h --> value projection --> [.., groups, r] --pad--> [.., groups, head dim] --> cache, attention
      --> [.., heads, head dim] --cut--> [.., heads, r] --> output projection

Both steps are hooks on the two projections, which stay ordinary linear layers for whoever adapts, quantises or saves
them. A third hook, on the attention module, lets them follow a projection that was wrapped or replaced.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class PadValues:
    """The forward hook of a value projection, or of one fused with queries and keys.

    Attributes:
        front: columns before the first group, passed as they are.
        groups: equal groups of columns, each with values at its end.
        padding: zeros behind each group: the head dim less the rank.
    """

    front: int
    groups: int
    padding: int

    def __call__(self, module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
        front, grouped = output[..., : self.front], output[..., self.front :].unflatten(-1, (self.groups, -1))
        padded = F.pad(grouped, (0, self.padding)).flatten(-2)
        return torch.cat([front, padded], -1) if self.front else padded


@dataclass(frozen=True)
class CutHeads:
    """The forward pre-hook of an output projection: of each of ``heads`` heads, the first ``rank`` columns."""

    heads: int
    rank: int

    def __call__(self, module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        heads, *others = arguments
        return (heads.unflatten(-1, (self.heads, -1))[..., : self.rank].flatten(-2), *others)


@dataclass(frozen=True)
class FollowProjections:
    """The forward pre-hook of an attention module: keeps the other two on the modules that stand there now.

    A wrapper (an adapter, say) takes the place of a projection and calls it: the hook then belongs to the wrapper.
    """

    reader: str
    writer: str
    pad: PadValues
    cut: CutHeads

    def __call__(self, attention: nn.Module, arguments: tuple[Any, ...]) -> None:
        reader, writer = attention.get_submodule(self.reader), attention.get_submodule(self.writer)
        if not any(type(hook) is PadValues for hook in reader._forward_hooks.values()):
            _move(reader, self.pad)
        if not any(type(hook) is CutHeads for hook in writer._forward_pre_hooks.values()):
            _move(writer, self.cut)


@torch.compiler.assume_constant_result  # torch.compile runs it once, while it traces
def _move(projection: nn.Module, hook: PadValues | CutHeads) -> None:
    """Take the hook of this type off what ``projection`` wraps, and hang it on the wrapper."""
    for inner in projection.modules():
        for registered in (inner._forward_hooks, inner._forward_pre_hooks):
            for key in [key for key, value in registered.items() if type(value) is type(hook)]:
                del registered[key]
    if isinstance(hook, PadValues):
        projection.register_forward_hook(hook)
    else:
        projection.register_forward_pre_hook(hook)


def lower_values(attention: nn.Module, reader: str, writer: str, pad: PadValues, cut: CutHeads) -> None:
    """Let ``attention`` run with narrow projections at the paths ``reader`` and ``writer``."""
    follow = FollowProjections(reader, writer, pad, cut)
    for key in [key for key, hook in attention._forward_pre_hooks.items() if type(hook) is FollowProjections]:
        del attention._forward_pre_hooks[key]  # of a rank that the attention had before
    attention.register_forward_pre_hook(follow)
    _move(attention.get_submodule(reader), pad)
    _move(attention.get_submodule(writer), cut)
