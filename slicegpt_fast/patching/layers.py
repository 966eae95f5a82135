"""Fused forwards for the decoder layers of one model.

A fused sublayer is two ops around what transformers keeps doing itself:

    h --> norm_linear(packed q, k, v) --> rope, cache, attention --> residual_linear(o, shortcut) --> h'
    h --> norm_linear(packed gate, up, activation) ----------------> residual_linear(down, shortcut) --> h'

The sums of squares of h's rows, which the norm needs, go from the op that wrote h to the next sublayer of the layer.
They stop at the layer's end: other code may write into h there, and no tensor tells of every write. A dense model's
norm has a weight, which only a copy of the readers could take in, and may subtract a mean: it runs before the op.

The attention module is called as ever, but with the stream in place of the normalised stream. Its query, key and value
projections have another ``forward`` on this instance: the first runs the op on the packed weight, the others take their
columns of its result. The output projection hands the heads through, and the sublayer ends with ``residual_linear``.

Each new forward asks its guard first whether everything is as it was when it was made: what it finds changed (a hook, a
wrapped projection, another class, autograd, autocast, training) goes the way it went before.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain, repeat, zip_longest
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.activations import ACT2FN

from slicegpt_fast.architectures import Architecture, Branch, Sublayer, Weight, at, weights
from slicegpt_fast.kernels.regimes import Activation, Epilogue, Residual
from slicegpt_fast.ops.backends.cpu import STREAMED_ROWS
from slicegpt_fast.ops.dispatch import Request
from slicegpt_fast.ops.norm_linear import norm_linear
from slicegpt_fast.ops.quantized import weight_format
from slicegpt_fast.ops.residual_linear import residual_linear
from slicegpt_fast.patching.guards import (
    ACTIVATION_CODE,
    Forward,
    Guard,
    NotFusable,
    check_code,
    check_layer,
    check_parameters,
    infers,
    is_known,
    places,
)
from slicegpt_fast.patching.packing import PackedWeight, PackedWeights, norm_linear_of_parts
from slicegpt_fast.slicing.layers import AlignedShortcut, WeightlessNorm, call_first, run_sublayer, shortcut_name

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

PREFILL_ROWS = 512  # of the prefill that is asked about

Requests = list[tuple[Request, Request | None]]  # of each op in turn: in decode and in prefill, None for torch's own


class WholeStep(Protocol):
    """A forward of the base model in which one native call may do several layers."""

    def take(
        self, layer: FusedLayer, hidden_states: Tensor, positional: tuple[Any, ...], named: dict[str, Any]
    ) -> Tensor | None: ...


class Running(threading.local):
    """What this thread is inside of: the attention of a sublayer, the forward of a base model."""

    def __init__(self) -> None:
        self.attention: AttentionCall | None = None
        self.step: WholeStep | None = None


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
            return cast(Tensor, type(self.linear).forward(self.linear, x))
        if x is not call.hidden_states:
            return self._taken(self.branch.read(x, None))
        if call.read is None:
            call.read = self.branch.read(x, call.sumsq)
        return self._taken(call.read)

    def _taken(self, read: Tensor) -> Tensor:
        columns = read[..., self.columns]
        pairs = columns.stride(-2) % 2 == 0 and self.columns.start % 2 == 0  # a complex view needs them
        return columns if pairs else columns.contiguous()


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
        self.layer, self.branch = layer, branch
        self.module: nn.Module = at(layer, branch.modules[0])
        self.norm: nn.Module = at(layer, branch.norm)
        self.eps_name = _eps_name(self.norm)
        readers, writers = weights(layer, branch.readers), weights(layer, branch.writers)
        if not readers or len(writers) != 1:
            raise NotFusable(f"it lacks {' or '.join(branch.writers if readers else branch.readers)}")
        self.reader = PackedWeight([*readers, *([] if down is None else [Weight(down)])])
        self.writer = PackedWeight(writers)
        self.unscaled = 0 if down is None else down.out_features
        self.backend = backend
        self.forwards = {}

    @property
    def bias(self) -> Tensor | None:
        """The readers' bias as ``norm_linear`` takes it: without the unscaled columns."""
        bias = self.reader.bias
        return bias[: -self.unscaled] if bias is not None and self.unscaled else bias

    def read(self, h: Tensor, sumsq: Tensor | None) -> Tensor:
        """The normalised stream through the readers and the activation: [B, T, d] -> [B, T, n + r]."""
        rows, eps = h.reshape(-1, h.shape[-1]), cast(float, self.eps_name and getattr(self.norm, self.eps_name))
        if isinstance(self.norm, WeightlessNorm):
            norm = (eps, self.norm.full_width, sumsq)
        else:
            if self.eps_name:
                rows = F.rms_norm(rows, rows.shape[1:], cast(Tensor, self.norm.weight), eps)
            else:
                rows = self.norm(rows)
            norm = normalised(rows)
        if torch.compiler.is_compiling():
            y = norm_linear_of_parts(rows, *self.reader.parts(), *norm, self.activation, self.unscaled, self.backend)
        else:
            weight, scales = self.reader.matrix, self.reader.scales
            rest = (*norm, self.activation, self.unscaled)
            y = norm_linear(rows, weight, self.bias, *rest, scales=scales, backend=self.backend)
        return y.view(*h.shape[:-1], -1)

    def run(self, h: Tensor, sumsq: Tensor | None, layer_arguments: dict[str, Any]) -> tuple[Tensor, Tensor, Any]:
        """What the writer reads [B, T, k], all that ``read`` gave [B, T, n + r], and the attention weights."""
        raise NotImplementedError

    def write(self, a: Tensor, h: Tensor, shortcut: Any) -> tuple[Tensor, Tensor]:
        """The writer, added to shortcut(h): a [B, T, k], h [M, d] -> [M, n] and its rows' sums of squares [M]."""
        weight, bias, scales = self.writer.matrix, self.writer.bias, self.writer.scales
        if torch.compiler.is_compiling():
            (weight,), (bias,), of_weight = self.writer.parts()
            scales = next(iter(of_weight), None)
        if self.branch.multiplier is not None:
            factor = cast(float, getattr(self.layer, self.branch.multiplier))
            a, bias = a * factor, None if bias is None else bias * factor
        a = a.reshape(-1, a.shape[-1])
        return residual_linear(a, weight, bias, h, shortcut, scales=scales, backend=self.backend)


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
            output = call_first(self.module, self.branch, h, layer_arguments)
        finally:
            running.attention = None
        heads, attention_weights = output[:2] if isinstance(output, tuple) else (output, None)
        return heads, cast(Tensor, call.read), attention_weights


class FusedFeedForward(FusedBranch):
    """A feed-forward network; an activation that the op lacks runs between the two ops."""

    def __init__(self, layer: nn.Module, branch: Branch, down: nn.Linear | None, backend: str) -> None:
        super().__init__(layer, branch, down, backend)
        rows = self.reader.rows()[-1].stop - self.unscaled
        self.gated = rows == 2 * self.writer.width
        self.act: nn.Module = at(layer, cast(str, branch.activation))
        if is_known(type(self.act), *ACTIVATION_CODE):
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

    def __init__(
        self,
        layer: nn.Module,
        architecture: Architecture,
        sublayer: Sublayer,
        family: str,
        dtype: torch.dtype,
        backend: str,
    ) -> None:
        """``family``: transformers' package of it. ``dtype``: of the activations.

        Raises:
            NotFusable: the sublayer is not made of what the ops compute.
        """
        check_layer(layer, architecture, family)
        check_code(layer, sublayer, family)
        check_parameters(layer, sublayer, family)
        self.module = layer
        self.dtype = dtype
        self.refused: str | None = None  # why it is not to run
        self.shortcut: nn.Module | None = getattr(layer, shortcut_name(sublayer), None)
        down = self.shortcut.down if isinstance(self.shortcut, AlignedShortcut) else None
        self.branches = [
            (FusedAttention if branch.activation is None else FusedFeedForward)(layer, branch, first, backend)
            for branch, first in zip_longest(sublayer.branches, (down,))
        ]
        self.forwards = {k: v for branch in self.branches for k, v in branch.forwards.items()}
        self.guard = Guard(places(layer, sublayer), self.forwards)
        packed = [packed for branch in self.branches for packed in (branch.reader, branch.writer)]
        self._unbiased = []  # the parameters of the shortcut's layers, whose biases the ops do not know
        for module in () if self.shortcut is None else self.shortcut.modules():
            if isinstance(module, nn.Linear):
                self._unbiased.append(module._parameters)
                if module is not down:
                    packed.append(PackedWeight([Weight(module)]))
        self.quantized = any(branch.reader.quantized or branch.writer.quantized for branch in self.branches)
        self.weights = PackedWeights(packed)
        reason = self.weights.refusal()
        if reason is not None:
            raise NotFusable(reason)

    def requests(self) -> Requests:
        """What the ops are asked for."""
        found: Requests = []
        pairs = chain((self._second_pair(),), repeat((0, "add")))
        for branch, (k2, shortcut) in zip(self.branches, pairs, strict=False):
            reader, writer = branch.reader.weights[0].matrix, branch.writer.weights[0].matrix
            rows = branch.reader.rows()[-1].stop
            found += requests("norm_linear", reader, self.dtype, (rows, branch.reader.width), branch.activation)
            found += requests(
                "residual_linear", writer, self.dtype, (writer.shape[0], branch.writer.width + k2), shortcut
            )
        torchs = not self.quantized and by_torch(reader, PREFILL_ROWS)
        return [(decode, None) for decode, _ in found] if torchs else found

    def _second_pair(self) -> tuple[int, Residual]:
        """The width of the second pair of matrices in ``residual_linear``, and the kind of shortcut."""
        if self.shortcut is None:
            return 0, "add"
        if not isinstance(self.shortcut, AlignedShortcut):
            return cast(Tensor, self.shortcut.weight).shape[1], "dense"
        return (0, "add") if self.shortcut.down is None else (self.shortcut.down.out_features, "low rank")

    def absent(self) -> bool:
        """True where a weight is not here."""
        return self.weights.absent()

    def unfused(self) -> str | None:
        """Why the sublayer would run unfused now, or None."""
        return self.changed() or self.weights.refusal()

    def changed(self) -> str | None:
        """What has happened to the sublayer that its fused form would not honour, or None."""
        return self.refused or self.guard.changed() or self.biased()

    def biased(self) -> str | None:
        """Whether the shortcut got a bias, which the ops do not know."""
        if any(parameters.get("bias") is not None for parameters in self._unbiased):
            return "its shortcut got a bias"
        return None

    def __call__(self, h: Tensor, sumsq: Tensor | None, layer_arguments: dict[str, Any]) -> tuple[Tensor, Tensor, Any]:
        """h [B, T, d], its rows' sums of squares [M] or None -> h' [B, T, d'], its own, and the attention weights."""
        rows = h.reshape(-1, h.shape[-1])
        first, *others = self.branches
        a, read, attention_weights = first.run(h, sumsq, layer_arguments)
        written, squares = first.write(a, *self._residual(rows, read.view(-1, read.shape[-1])))
        for branch in others:
            a, _, weights_here = branch.run(h, sumsq, layer_arguments)
            written, squares = branch.write(a, written, None)
            attention_weights = weights_here if attention_weights is None else attention_weights
        return written.view(*h.shape[:-1], -1), squares, attention_weights

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
        self.refused: str | None = None  # why it is not to run
        self.guard = Guard((), {}, (layer,))
        self.forwards: dict[nn.Module, Forward] = {layer: self.forward}
        self._loading: RemovableHandle | None = None

    def attach(self) -> None:
        """Lay the weights out, now and whenever ``load_state_dict`` has put others in their place."""
        self._loading = self.layer.register_load_state_dict_post_hook(self._refresh)
        self._refresh()

    def _refresh(self, *_: Any) -> None:
        for sublayer in self.sublayers.values():
            if sublayer.changed() is None:
                sublayer.weights.refresh()

    def release(self) -> None:
        """Give the parameters memory of their own; whoever kept ``forward`` may call it."""
        if self._loading is not None:
            self._loading.remove()
        for sublayer in self.sublayers.values():
            sublayer.weights.unpack()
        self.sublayers.clear()

    def forward(self, hidden_states: Tensor, *positional: Any, **layer_arguments: Any) -> Any:
        layer, architecture = self.layer, self.architecture
        if running.step is not None:
            result = running.step.take(self, hidden_states, positional, layer_arguments)
            if result is not None:
                return result
        if self.refused is not None or not infers(layer, hidden_states) or self.guard.replaced() is not None:
            return type(layer).forward(layer, hidden_states, *positional, **layer_arguments)
        layer_arguments.update(zip(architecture.positional, positional, strict=False))
        attention_weights = sumsq = None
        many = by_torch(hidden_states, hidden_states.shape[:-1].numel())
        for sublayer in architecture.sublayers:
            fused = self.sublayers.get(sublayer.name)
            if fused is not None and many and not fused.quantized:
                fused = None
            if fused is not None and fused.changed() is None and fused.weights.refresh() is None:
                hidden_states, sumsq, weights_here = fused(hidden_states, sumsq, layer_arguments)
            else:
                hidden_states, weights_here = run_sublayer(layer, sublayer, hidden_states, **layer_arguments)
                sumsq = None
            attention_weights = weights_here if attention_weights is None else attention_weights
        return (hidden_states, attention_weights) if architecture.returns_tuple else hidden_states


def by_torch(x: Tensor, rows: int) -> bool:
    """Whether so many rows, of the dtype and device of ``x``, go through a layer as it was: on a CPU torch multiplies
    them either way, and what the ops save beside that is lost in its noise. Not so where weights are quantised: the ops
    dequantise faster than torch."""
    return x.device.type == "cpu" and rows > STREAMED_ROWS.get(x.dtype, 0)


def requests(
    op: str, weight: Tensor, dtype: torch.dtype, widths: tuple[int, int], epilogue: Epilogue | None = None
) -> Requests:
    """What a call with a weight like ``weight``, of N rows and K columns, asks of an op; ``dtype``: of the activations
    where the weight is quantised."""
    stored = weight_format(weight)
    dtype = weight.dtype if stored == "full" else dtype
    decode = Request(op, weight.device, dtype, "decode", (1, *widths), epilogue, stored)
    return [(decode, replace(decode, regime="prefill", shape=(PREFILL_ROWS, *widths)))]


def normalised(x: Tensor) -> tuple[float, int, Tensor]:
    """The eps, width and sums of squares [M] by which ``norm_linear`` leaves the rows of x [M, d] as they are."""
    if torch.compiler.is_compiling() or (x.is_cuda and torch.cuda.is_current_stream_capturing()):
        return 1.0, 1, torch.zeros(x.shape[0], dtype=torch.float32, device=x.device)  # memory that is the graph's
    return 1.0, 1, _zeros(x.device, -(-x.shape[0] // 64) * 64)[: x.shape[0]]


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def _zeros(device: torch.device, count: int) -> Tensor:
    """A vector that nobody writes to, for all streams."""
    zeros = torch.zeros(count, dtype=torch.float32, device=device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return zeros


def _eps_name(norm: nn.Module) -> str | None:
    """The attribute that holds an RMSNorm's epsilon; None for other norms, which run as they are."""
    if isinstance(norm, WeightlessNorm | nn.RMSNorm):
        return "eps"
    is_rms_norm = type(norm).__name__.endswith("RMSNorm") and hasattr(norm, "variance_epsilon")
    return "variance_epsilon" if is_rms_norm else None
