"""Fused forwards for the decoder layers of one model.

A fused sublayer is two ops around what transformers keeps doing itself:

    h --> norm_linear(packed q, k, v) --> rope, cache, attention --> residual_linear(o, shortcut) --> h'
    h --> norm_linear(packed gate, up, activation) ----------------> residual_linear(down, shortcut) --> h'

Each h carries the sums of squares of its rows, which the next norm needs, from the op that wrote it. A dense model's
norm has a weight, which only a copy of the readers could take in: it runs before the op.

The attention module is called as ever, but with the stream in place of the normalised stream. Its query, key and value
projections have another ``forward`` on this instance: the first runs the op on the packed weight, the others take their
columns of its result. The output projection hands the heads through, and the sublayer ends with ``residual_linear``.

Each new forward asks first whether everything is as it was when it was made: what it finds changed (a hook, a wrapped
projection, autograd, autocast, training) goes the way it went before.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, repeat, zip_longest
from types import MethodType
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from slicegpt_fast.architectures import Architecture, Branch, Sublayer, Weight, at, weights
from slicegpt_fast.kernels.regimes import Activation, Epilogue, Residual
from slicegpt_fast.ops.dispatch import HALF, Request
from slicegpt_fast.ops.norm_linear import norm_linear
from slicegpt_fast.ops.residual_linear import residual_linear
from slicegpt_fast.patching.packing import PackedWeight
from slicegpt_fast.slicing.layers import (
    AlignedShortcut,
    WeightlessNorm,
    norm_eps,
    run_sublayer,
    shortcut_name,
)

DTYPES = (torch.float32, *HALF)
# The classes of transformers that compute an activation of norm_linear.
ACTIVATIONS = {
    type(ACT2FN[name]): activation
    for activation, names in {
        "relu": ("relu",),
        "gelu": ("gelu",),
        "gelu_tanh": ("gelu_new", "gelu_fast", "gelu_pytorch_tanh"),
    }.items()
    for name in names
}
GATED_ACTIVATIONS = {type(ACT2FN[name]): "silu_gate" for name in ("silu", "swish")}
LINEARS = ("Linear", "Conv1D", "FalconLinear")  # classes that compute x W^T + b and nothing else
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


Forward = Callable[..., Tensor]
Requests = list[tuple[Request, Request | None]]  # of each op in turn: in decode and in prefill, None for torch's own


class NotFusable(Exception):
    """Why a sublayer keeps its unfused forward."""


class Running(threading.local):
    """The sublayer whose attention this thread is inside of."""

    def __init__(self) -> None:
        self.attention: AttentionCall | None = None


running = Running()


@dataclass
class AttentionCall:
    """One run of an attention module on the stream: what its projections have to know of each other."""

    branch: FusedBranch
    hidden_states: Tensor
    sumsq: Tensor | None
    read: Tensor | None = None  # result of the packed projection, [B, T, n + r]


class ReaderForward:
    """The forward of a query, key or value projection: its columns of the packed projection."""

    def __init__(self, linear: nn.Module, branch: FusedBranch, columns: slice) -> None:
        self.linear = linear
        self.branch = branch
        self.columns = columns

    def forward(self, x: Tensor) -> Tensor:
        call = running.attention
        if call is None or call.branch is not self.branch:
            return type(self.linear).forward(self.linear, x)
        if x is not call.hidden_states:
            return self.branch.read(x, None)[..., self.columns]
        if call.read is None:
            call.read = self.branch.read(x, call.sumsq)
        return call.read[..., self.columns]


class WriterForward:
    """The forward of an attention's output projection: none, for the sublayer applies it."""

    def __init__(self, linear: nn.Module, branch: FusedBranch) -> None:
        self.linear = linear
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        call = running.attention
        inside = call is not None and call.branch is self.branch
        return x if inside else type(self.linear).forward(self.linear, x)


class FusedBranch:
    """``read`` and ``write``: the two ops of one branch."""

    activation: Activation | None = None
    forwards: dict[nn.Module, Forward]

    def __init__(self, layer: nn.Module, branch: Branch, down: nn.Linear | None, backend: str) -> None:
        """``down``: the first factor of a low-rank shortcut, which rides along in ``read``."""
        self.module: nn.Module = at(layer, branch.modules[0])
        self.norm: nn.Module = at(layer, branch.norm)
        self.eps, self.full_width = _norm(self.norm)
        self.reader = PackedWeight([*_linears(layer, branch.readers), *([] if down is None else [Weight(down)])])
        self.writer = PackedWeight(_linears(layer, branch.writers))
        self.unscaled = 0 if down is None else down.out_features
        self.backend = backend
        self.forwards = {}

    def read(self, h: Tensor, sumsq: Tensor | None) -> Tensor:
        """The normalised stream through the readers and the activation: [B, T, d] -> [B, T, n + r]."""
        rows, weight, bias = h.reshape(-1, h.shape[-1]), self.reader.matrix, self.reader.bias
        if bias is not None and self.unscaled:
            bias = bias[: -self.unscaled]
        norm = (self.eps, self.full_width, sumsq)
        if not isinstance(self.norm, WeightlessNorm):
            rows = F.rms_norm(rows, rows.shape[1:], cast(Tensor, self.norm.weight), self.eps)
            norm = normalised(rows)
        y = norm_linear(rows, weight, bias, *norm, self.activation, self.unscaled, backend=self.backend)
        return y.view(*h.shape[:-1], -1)

    def run(self, h: Tensor, sumsq: Tensor | None, layer_arguments: dict[str, Any]) -> tuple[Tensor, Tensor, Any]:
        """What the writer reads [B, T, k], all that ``read`` gave [B, T, n + r], and the attention weights."""
        raise NotImplementedError

    def write(self, a: Tensor, h: Tensor, shortcut: Any) -> tuple[Tensor, Tensor]:
        """The writer, added to shortcut(h): a [B, T, k], h [M, d] -> [M, n] and its rows' sums of squares [M]."""
        weight = self.writer.matrix
        return residual_linear(a.reshape(-1, a.shape[-1]), weight, self.writer.bias, h, shortcut, backend=self.backend)


class FusedAttention(FusedBranch):
    """An attention module on the stream, with other forwards for its projections."""

    def __init__(self, layer: nn.Module, branch: Branch, down: nn.Linear | None, backend: str) -> None:
        super().__init__(layer, branch, down, backend)
        for path in branch.modules[1:]:
            if not isinstance(at(layer, path), nn.Dropout):
                raise NotFusable(f"{path} follows the attention")
        for weight, columns in zip(self.reader.weights, self.reader.rows(), strict=True):
            if weight.owner is not down:
                self.forwards[weight.owner] = ReaderForward(weight.owner, self, columns).forward
        (writer,) = self.writer.weights
        self.forwards[writer.owner] = WriterForward(writer.owner, self).forward

    def run(self, h: Tensor, sumsq: Tensor | None, layer_arguments: dict[str, Any]) -> tuple[Tensor, Tensor, Any]:
        call = running.attention = AttentionCall(self, h, sumsq)
        try:
            output = self.module(h, **layer_arguments)
        finally:
            running.attention = None
        heads, attention_weights = output[:2] if isinstance(output, tuple) else (output, None)
        return heads, cast(Tensor, call.read), attention_weights


class FusedFeedForward(FusedBranch):
    """A feed-forward network; an activation that the op lacks runs between the two ops."""

    def __init__(self, layer: nn.Module, branch: Branch, down: nn.Linear | None, backend: str) -> None:
        super().__init__(layer, branch, down, backend)
        rows = self.reader.rows()[-1].stop - self.unscaled
        self.gated = rows == 2 * self.writer.weights[0].matrix.shape[1]
        self.act: nn.Module = at(layer, cast(str, branch.activation))
        computed = (GATED_ACTIVATIONS if self.gated else ACTIVATIONS).get(type(self.act))
        self.activation = cast(Activation | None, computed)

    def run(self, h: Tensor, sumsq: Tensor | None, layer_arguments: dict[str, Any]) -> tuple[Tensor, Tensor, Any]:
        read = self.read(h, sumsq)
        a = read[..., : read.shape[-1] - self.unscaled]
        if self.activation is None and self.gated:
            gate, up = a.chunk(2, dim=-1)
            a = self.act(gate) * up
        elif self.activation is None:
            a = self.act(a)
        return a, read, None


class FusedSublayer:
    """``h <- shortcut(h) + the branches``, in two ops per branch."""

    def __init__(self, layer: nn.Module, sublayer: Sublayer, backend: str) -> None:
        """
        Raises:
            NotFusable: the sublayer is not made of what the ops compute.
        """
        self.module = layer
        self.shortcut: nn.Module | None = getattr(layer, shortcut_name(sublayer), None)
        _check(layer, sublayer)
        down = self.shortcut.down if isinstance(self.shortcut, AlignedShortcut) else None
        self.branches = [
            (FusedAttention if branch.activation is None else FusedFeedForward)(layer, branch, first, backend)
            for branch, first in zip_longest(sublayer.branches, (down,))
        ]
        self.forwards = {k: v for branch in self.branches for k, v in branch.forwards.items()}
        # What must stay as it is then: which modules stand where, that none has hooks, and whose forward runs.
        places = list(_places(layer, sublayer, self.shortcut))
        self._slots = [(parent._modules, name) for parent, name in places]
        self._modules = [slots[name] for slots, name in self._slots]
        self._hooks = [getattr(module, hooks) for module in self._modules for hooks in HOOKS]
        self._owns = [module.__dict__ for module in self._modules]
        replaced = [{forward_slot(m): self.forwards[m]} if m in self.forwards else {} for m in self._modules]
        self._forwards = [_own_forwards(own | forward) for own, forward in zip(self._owns, replaced, strict=True)]

    def requests(self) -> Requests:
        """What the ops are asked for."""
        found = []
        pairs = chain((self._second_pair(),), repeat((0, "add")))
        for branch, (k2, shortcut) in zip(self.branches, pairs, strict=False):
            reader, writer = branch.reader.weights[0].matrix, branch.writer.weights[0].matrix
            rows = branch.reader.rows()[-1].stop
            found += requests("norm_linear", reader, (rows, reader.shape[1]), branch.activation)
            found += requests("residual_linear", writer, (writer.shape[0], writer.shape[1] + k2), shortcut)
        return found

    def _second_pair(self) -> tuple[int, Residual]:
        """The width of the second pair of matrices in ``residual_linear``, and the kind of shortcut."""
        if self.shortcut is None:
            return 0, "add"
        if not isinstance(self.shortcut, AlignedShortcut):
            return cast(Tensor, self.shortcut.weight).shape[1], "dense"
        return (0, "add") if self.shortcut.down is None else (self.shortcut.down.out_features, "low rank")

    def offloaded(self) -> bool:
        """True where a weight is not here."""
        return any(p.device.type == "meta" for module in self._modules for p in cast(nn.Module, module).parameters())

    def changed(self) -> str | None:
        """What has happened to the sublayer that its fused form would not honour, or None."""
        if [slots.get(name) for slots, name in self._slots] != self._modules:
            return "one of its modules was replaced"
        if any(self._hooks) and any(_foreign(hooks) for hooks in self._hooks):
            return "a hook on one of its modules"
        if [_own_forwards(own) for own in self._owns] != self._forwards:
            return "one of its modules got another forward"
        return None

    def __call__(self, h: Tensor, layer_arguments: dict[str, Any]) -> tuple[Tensor, Any]:
        rows, sumsq = h.reshape(-1, h.shape[-1]), row_statistic(h)
        first, *others = self.branches
        a, read, attention_weights = first.run(h, sumsq, layer_arguments)
        written, squares = first.write(a, *self._residual(rows, read.view(-1, read.shape[-1])))
        for branch in others:
            a, _, weights_here = branch.run(h, sumsq, layer_arguments)
            written, squares = branch.write(a, written, None)
            attention_weights = weights_here if attention_weights is None else attention_weights
        following = written.view(*h.shape[:-1], -1)
        set_row_statistic(following, squares)
        return following, attention_weights

    def _residual(self, h: Tensor, read: Tensor) -> tuple[Tensor, Any]:
        """The stream and the shortcut as ``residual_linear`` takes them."""
        if self.shortcut is None:
            return h, None
        if not isinstance(self.shortcut, AlignedShortcut):
            return h, cast(Tensor, self.shortcut.weight).T
        padding, up = self.shortcut.padding, self.shortcut.up
        h = F.pad(h, (0, padding)) if padding else h
        if up is None:
            return h, None
        V = F.pad(up.weight, (0, 0, 0, padding)).T if padding else up.weight.T
        return h, (-read[:, read.shape[1] - V.shape[0] :], V)


class FusedLayer:
    """The forward of one decoder layer of this instance: fused sublayers where they can be, the others as they were."""

    def __init__(self, layer: nn.Module, architecture: Architecture) -> None:
        self.layer = layer
        self.architecture = architecture
        self.sublayers: dict[str, FusedSublayer] = {}
        self.unfused = getattr(layer, forward_slot(layer))
        self.forwards: dict[nn.Module, Forward] = {layer: self.forward}
        self._parameters: list[Tensor] = list(layer.parameters())
        self._loading: RemovableHandle | None = None

    def attach(self) -> None:
        """Lays the weights out, now and whenever ``load_state_dict`` has put others in their place."""
        self._loading = self.layer.register_load_state_dict_post_hook(self._pack)
        self._pack()

    def _pack(self, *_: Any) -> None:
        for sublayer in self.sublayers.values():
            for branch in sublayer.branches:
                branch.reader.refresh()
                branch.writer.refresh()

    def release(self) -> None:
        """Gives the parameters memory of their own; whoever kept ``forward`` may call it."""
        if self._loading is not None:
            self._loading.remove()
        for sublayer in self.sublayers.values():
            for branch in sublayer.branches:
                branch.reader.unpack()
                branch.writer.unpack()
        self.sublayers.clear()

    def forward(self, hidden_states: Tensor, *positional: Any, **layer_arguments: Any) -> Any:
        if not infers(self.layer, self._parameters, hidden_states):
            return self.unfused(hidden_states, *positional, **layer_arguments)
        layer, architecture = self.layer, self.architecture
        if _foreign(layer._forward_pre_hooks):  # which may have changed the stream in place
            set_row_statistic(hidden_states, None)
        layer_arguments.update(zip(architecture.positional, positional, strict=False))
        attention_weights = None
        for sublayer in architecture.sublayers:
            fused = self.sublayers.get(sublayer.name)
            if fused is not None and fused.changed() is None:
                hidden_states, weights_here = fused(hidden_states, layer_arguments)
            else:
                hidden_states, weights_here = run_sublayer(layer, sublayer, hidden_states, **layer_arguments)
            attention_weights = weights_here if attention_weights is None else attention_weights
        if _foreign(layer._forward_hooks):
            set_row_statistic(hidden_states, None)
        return (hidden_states, attention_weights) if architecture.returns_tuple else hidden_states


def forward_slot(module: nn.Module) -> str:
    """The attribute that holds what a module runs: accelerate puts its own ``forward`` before it."""
    return "_old_forward" if "_old_forward" in module.__dict__ else "forward"


def is_plain(module: nn.Module) -> bool:
    """True where a module runs its class's forward, at most under a hook of accelerate's that moves its arguments."""
    hook = module.__dict__.get("_hf_hook")
    if hook is not None and (type(hook).__name__ != "AlignDevicesHook" or hook.offload):
        return False
    own = module.__dict__.get(forward_slot(module))
    return own is None or own == MethodType(type(module).forward, module)


def infers(module: nn.Module, parameters: list[Tensor], x: Tensor) -> bool:
    """True where ``module(x)`` is plain inference: no training, no gradient wanted, no autocast."""
    wants_grad = torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in parameters))
    return not (module.training or wants_grad or torch.is_autocast_enabled(x.device.type))


def requests(op: str, weight: Tensor, widths: tuple[int, int], epilogue: Epilogue | None = None) -> Requests:
    """What a call with a weight like ``weight``, of N rows and K columns, asks of an op."""
    decode = Request(op, weight.device, weight.dtype, "decode", (1, *widths), epilogue)
    return [(decode, replace(decode, regime="prefill", shape=(512, *widths)))]


def row_statistic(h: Tensor) -> Tensor | None:
    """The rows' sums of squares [M] that ``h`` carries, unless ``h`` was changed since."""
    sumsq, version = getattr(h, "row_statistic", (None, None))
    return sumsq if version == _version(h) else None


def set_row_statistic(h: Tensor, sumsq: Tensor | None) -> None:
    """Lets ``h`` carry its rows' sums of squares [M] to whoever reads it next, or none."""
    h.row_statistic = (sumsq, _version(h))  # type: ignore[attr-defined]


def _version(h: Tensor) -> int | None:
    return None if torch.compiler.is_compiling() or h.is_inference() else h._version


def normalised(x: Tensor) -> tuple[float, int, Tensor]:
    """The eps, width and sums of squares [M] by which ``norm_linear`` leaves the rows of x [M, d] as they are."""
    return 1.0, 1, torch.zeros(x.shape[0], dtype=torch.float32, device=x.device)


def _norm(norm: nn.Module) -> tuple[float, int]:
    """A norm's eps, and the width it divides by."""
    if isinstance(norm, WeightlessNorm):
        return norm.eps, norm.full_width
    if "RMSNorm" in type(norm).__name__:
        return norm_eps(norm), cast(Tensor, norm.weight).shape[0]
    raise NotFusable(
        f"its {type(norm).__name__} subtracts a mean: slice the model first, at sparsity=0 to keep all of it"
    )


def _linears(layer: nn.Module, paths: tuple[str, ...]) -> list[Weight]:
    found = weights(layer, paths)
    for weight in found:
        if not isinstance(weight.owner, nn.Linear | Conv1D) or type(weight.owner).__name__ not in LINEARS:
            raise NotFusable(f"it has a {type(weight.owner).__name__}, not a plain linear layer")
    return found


def _check(layer: nn.Module, sublayer: Sublayer) -> None:
    """Raises NotFusable unless all the sublayer's weights are plain tensors of one of DTYPES."""
    modules = [getattr(parent, name) for parent, name in _places(layer, sublayer, None)]
    for parameter in chain.from_iterable(module.parameters() for module in modules):
        if type(parameter.data) is not Tensor or parameter.dtype not in DTYPES:
            raise NotFusable(f"its weights are quantised or of dtype {parameter.dtype}")
    for module in modules:
        if not is_plain(module):
            raise NotFusable(f"a {type(module).__name__} in it has a forward of its own")


def _places(layer: nn.Module, sublayer: Sublayer, shortcut: nn.Module | None) -> Iterator[tuple[nn.Module, str]]:
    """Parent and name of every module that the fused form replaces or goes around."""
    paths = []
    for branch in sublayer.branches:
        paths += [branch.norm, *branch.modules, *branch.readers, *branch.writers]
        paths += [branch.activation] if branch.activation else []
    for path in dict.fromkeys(paths):
        parent_path, _, name = path.rpartition(".")
        try:
            parent = at(layer, parent_path)
        except AttributeError:
            continue
        if parent._modules.get(name) is not None:
            yield parent, name
    if shortcut is not None:
        yield layer, shortcut_name(sublayer)
        yield from ((shortcut, name) for name, child in shortcut.named_children() if child is not None)


def _own_forwards(own: dict[str, Any]) -> tuple[Any, Any]:
    return own.get("forward"), own.get("_old_forward")


def _foreign(hooks: dict[int, Callable[..., Any]]) -> bool:
    """True where a hook is not one with which transformers records attention weights and hidden states."""
    return any(not getattr(hook, "__module__", "").startswith("transformers.") for hook in hooks.values())
